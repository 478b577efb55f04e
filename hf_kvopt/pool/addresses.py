"""Where the tokens of a block table lie: slots, device tensors and strides of its rows, made once for all layers.

What is asked is kept until the rows or their lengths change: all layers of a step ask the same.
"""

import torch
from torch import Tensor

from hf_kvopt.pool import slots as arithmetic
from hf_kvopt.pool.slots import Layout, Memo, RowTensors, Step

_UNKNOWN = (-1, -1)


class Addresses:
    """Rows of blocks and what is known of their places; `BlockTable` changes them.

    Row i's token t stands in column lags[i] + t; columns are counted up to `clock`, the first one held is `base`.

    Args:
        block_size: tokens a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.rows: list[list[int]] = []
        self.lags: list[int] = []  # columns before the first token of each row
        self.clock = self.base = 0
        self.version = 0  # counts changes: a handle made before one is out of date
        self._tensors = Memo()
        self._step: tuple[tuple[int, int, int], Step] | None = None
        self._rows_on: tuple[torch.device, RowTensors] | None = None
        self._layout: Layout | None = None
        self._span: tuple[int, int] | None = _UNKNOWN

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first `reserve`."""
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, those dropped behind a window included."""
        return [max(0, self.clock - lag) for lag in self.lags]

    @property
    def is_ragged(self) -> bool:
        """Whether some row begins later than the first column."""
        return any(self.lags)

    def span(self) -> tuple[int, int] | None:
        """(first slot of row 0, slots from row to row) where rows are even and begin together, else None."""
        if self._span == _UNKNOWN:
            self._span = None if self.is_ragged else self.layout.pitch
        return self._span

    @property
    def layout(self) -> Layout:
        """How the rows lie in memory."""
        if self._layout is None:
            self._layout = Layout(self.rows, self.block_size)
        return self._layout

    def rows_on(self, device: torch.device) -> RowTensors:
        """The rows as attention reads them; short rows are filled with block 0, lengths count from `base` on."""
        if self._rows_on is None or self._rows_on[0] != device:
            blocks = self._tensors.of(("table", device), lambda: arithmetic.padded_rows(self.rows), torch.int32)
            lens = self._tensors.of(
                ("lens", device), lambda: [max(0, n - self.base) for n in self.lengths], torch.int32
            )
            lags = self._tensors.of(("lags", device), lambda: self.lags, torch.int32) if self.is_ragged else None
            self._rows_on = device, (blocks, lens, lags)
        return self._rows_on[1]

    def slots(self, start: int, stop: int, device: torch.device) -> Tensor:
        """[batch, stop - start] int64 slots of the columns `start` to `stop`; -1 where a row has no token."""
        key = ("slots", device, start, stop)
        return self._tensors.of(key, lambda: arithmetic.column_slots(self, start, stop), torch.int64)

    def gather_slots(self, skip: int, num_columns: int, device: torch.device) -> Tensor:
        """[batch, num_columns] int64 slots from column base + `skip` on; some slot of the row where it has no token."""
        key = ("gather", device, skip, num_columns)
        return self._tensors.get(key, lambda: arithmetic.picked(self, skip, num_columns, device))

    @property
    def memo(self) -> Memo:
        """Tensors made from the rows, until these or their lengths change."""
        return self._tensors

    def exact_changed(self) -> None:
        """Forget where exact blocks lie."""
        self._tensors.forget("exact")

    def _rows_changed(self) -> None:
        self.version += 1
        self._tensors = Memo()
        self._step, self._rows_on, self._layout, self._span = None, None, None, _UNKNOWN

    def _lengths_changed(self) -> None:
        self.version += 1
        self._step, self._rows_on = None, None
        self._tensors.forget_all_but("table")
