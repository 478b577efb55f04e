"""Addresses of the tokens of a block table: slots, device tensors and strides of its rows, made once for all layers.

What is asked is kept until the rows or their lengths change: all layers of a step ask the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.blocks import gathered, strided
from hf_kvopt.kernels.calls import RowTensors, SharedBlocks
from hf_kvopt.pool.runs import Runs, shared_tokens
from hf_kvopt.pool.slots import Memo, RowLayout, Step, padded_rows

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
        self._layout: RowLayout | None = None
        self._runs: Runs | None = None
        self._shared_of: tuple[tuple[Any, ...], SharedBlocks | None] | None = None
        self._span: tuple[int, int] | None = _UNKNOWN

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first `reserve`."""
        return len(self.rows)

    @property
    def origin(self) -> int:
        """The column that tokens are counted from where their blocks are numbered."""
        return 0

    @property
    def first_block(self) -> int:
        """The number of each row's first block that is held; more than 0 behind a window."""
        return (self.base - self.origin) // self.block_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, those dropped behind a window included."""
        return [max(0, self.clock - lag) for lag in self.lags]

    @property
    def is_ragged(self) -> bool:
        """Return whether some row begins later than the first column."""
        return any(self.lags)

    def starts(self, skip: int, num_columns: int) -> list[int] | None:
        """First of `num_columns` columns, from base + `skip` on, that holds a token of each row; None where all begin
        with the first column."""
        if not self.is_ragged:
            return None
        first = self.base + skip
        return [min(num_columns, max(0, lag - first)) for lag in self.lags]

    def span(self) -> tuple[int, int] | None:
        """(first slot of row 0, slots from row to row) where rows are even and begin together, else None."""
        if self._span == _UNKNOWN:
            self._span = None if self.is_ragged else self.layout.pitch
        return self._span

    @property
    def layout(self) -> RowLayout:
        """Return how the rows lie in memory."""
        if self._layout is None:
            self._layout = RowLayout(self.rows, self.block_size)
        return self._layout

    def rows_on(self, device: torch.device) -> RowTensors:
        """The rows as attention reads them; short rows are filled with block 0, lengths count from `base` on."""
        if self._rows_on is None or self._rows_on[0] != device:
            blocks = self._tensors.of(("table", device), lambda: padded_rows(self.rows), torch.int32)
            lens = self._tensors.of(
                ("lens", device), lambda: [max(0, n - self.base) for n in self.lengths], torch.int32
            )
            lags = self._tensors.of(("lags", device), lambda: self.lags, torch.int32) if self.is_ragged else None
            self._rows_on = device, (blocks, lens, lags)
        return self._rows_on[1]

    def tensors_up_to(self, columns: int, device: torch.device) -> RowTensors:
        """`rows_on` without what lies behind the first `columns` columns that are held."""
        known = self._rows_on
        rows = known[1] if known is not None and known[0] == device else self.rows_on(device)
        late = self.clock - self.base - columns
        return (rows[0], (rows[1] - late).clamp(min=0), rows[2]) if late else rows

    def shared_blocks(
        self, columns: int, q_len: int, starts: Tensor | Sequence[int] | None, device: torch.device
    ) -> SharedBlocks | None:
        """Return what rows share of the tokens that all of their last `q_len` queries see; None for nothing, or where
        `starts` are known to the device alone or hide unlike many tokens of a run."""
        if self._runs is None:
            self._runs = Runs.of(self.rows)
        if self._runs.size == 1 or isinstance(starts, Tensor):
            return None
        asked = columns, q_len, None if starts is None else tuple(starts), device
        if self._shared_of is None or self._shared_of[0] != asked:
            self._shared_of = asked, self._find_shared(columns, q_len, starts, device)
        return self._shared_of[1]

    def _find_shared(
        self, columns: int, q_len: int, starts: Sequence[int] | None, device: torch.device
    ) -> SharedBlocks | None:
        assert self._runs is not None
        size = self._runs.size
        if starts is not None:
            hidden = [max(0, start - lag) for start, lag in zip(starts, self.lags, strict=True)]
            if any(len(set(hidden[i : i + size])) > 1 for i in range(0, len(hidden), size)):
                return None
        late = self.clock - columns  # `base` is part of both
        seen = [length - late - q_len for length in self.lengths]
        return shared_tokens(self._runs, self.block_size, seen, device)

    def read(self, x: Tensor, skip: int, kv_len: int) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, ...] of x [num_blocks, block_size, num_kv_heads, ...], from `skip` on: a
        view where rows lie evenly, else a copy."""
        span = self.span()
        if span is None:
            return gathered(x, self.gather_slots(skip, kv_len, x.device))
        return strided(x, span[0] + skip, span[1], self.batch_size, kv_len)

    def slots(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return [batch, stop - start] int64 slots of the columns `start` to `stop`; -1 where a row has no token."""
        key = ("slots", device, start, stop)
        return self._tensors.of(key, lambda: self._column_slots(start, stop), torch.int64)

    def numbers(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return [len(numbers)] int32 on a device, copied there once a step for all layers."""
        return self._tensors.of(("numbers", device, *numbers), lambda: list(numbers), torch.int32)

    def gather_slots(self, skip: int, num_columns: int, device: torch.device) -> Tensor:
        """Return int64 slots [batch, num_columns] from column base + `skip` on; any one where a row has none."""
        key = ("gather", device, skip, num_columns)
        return self._tensors.get(key, lambda: self._picked(skip, num_columns, device))

    def _column_slots(self, start: int, stop: int) -> list[list[int]]:
        """Slots of the columns `start` to `stop` of each row; -1 where it has no token."""
        size, slots = self.block_size, []
        for row, lag in zip(self.rows, self.lags, strict=True):
            first = self.base + lag  # the column of the row's first slot
            none = [-1] * (min(stop, first) - start)
            slots.append(none + [row[c // size] * size + c % size for c in range(max(start - first, 0), stop - first)])
        return slots

    def _picked(self, skip: int, num_columns: int, device: torch.device) -> Tensor:
        """Return int64 slots [batch, num_columns] from column base + `skip` on; any one where a row has none."""
        block_table, _, lags = self.rows_on(device)
        tokens = torch.arange(skip, skip + num_columns, device=device).expand(len(block_table), -1)
        if lags is not None:
            tokens = (tokens - lags[:, None]).clamp(min=0)
        blocks = block_table.long().gather(1, tokens // self.block_size)
        return blocks * self.block_size + tokens % self.block_size

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
        self._runs, self._shared_of = None, None

    def _lengths_changed(self) -> None:
        self.version += 1
        self._step, self._rows_on, self._shared_of = None, None, None
        self._tensors.forget_all_but("table")
