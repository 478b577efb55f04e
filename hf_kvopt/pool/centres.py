"""Centres: which constant was taken from the keys of each block before they were stored.

A block belongs to rows that share their first tokens, and so their centre: the number of the centre is kept by block
and follows it through forks, beams, prefixes and relayouts. Number 0 is no shift at all, which is all that most models
ever see; then nothing here touches a tensor.
"""

import torch
from torch import Tensor

from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.quant import CENTRE_TOKENS, centre_of

# From so many centres on, those that no block refers to are thrown out once they are the most.
_SPARE = 64


class Centres:
    """The centres of one layer's keys.

    Args:
        num_heads: of the keys.
        dim: of a head.
        num_blocks: of the pool.
        device: where the keys are.
    """

    def __init__(self, num_heads: int, dim: int, num_blocks: int, device: torch.device) -> None:
        self.vectors = torch.zeros(1, num_heads, dim, device=device)
        self.ids = [0] * num_blocks
        self._last: tuple[tuple[int, ...], Tensor] | None = None

    def of_rows(self, table: BlockTable) -> Tensor | None:
        """[batch, num_kv_heads, head_dim] float32; None where no row has a shift."""
        return self._gathered([self.ids[row[-1]] if row else 0 for row in table.rows])

    def before_write(self, states: Tensor, table: BlockTable, start: int, stop: int) -> Tensor | None:
        """The centres of the rows for states [batch, num_kv_heads, stop - start, head_dim] at these columns.

        A row that begins here learns its centre from them; the others go on with that of the block before.
        """
        self._drop_unused()
        numbers = []
        for i, row in enumerate(table.rows):
            first = max(table.base, table.lags[i])  # the column of the row's first token
            past, last = start - first, stop - first
            if last <= 0:
                numbers.append(0)
                continue
            if past > 0:
                number = self.ids[row[(past - 1) // table.block_size]]
            else:
                number = self._learn(states[i, :, first - start :])
            for block in row[max(0, past) // table.block_size : -(-last // table.block_size)]:
                self.ids[block] = number
            numbers.append(number)
        return self._gathered(numbers)

    def of_blocks(self, blocks: list[int]) -> Tensor:
        """[len(blocks), num_kv_heads, head_dim] float32."""
        return self.vectors[[self.ids[block] for block in blocks]]

    def put_blocks(self, blocks: list[int], vectors: Tensor) -> None:
        """Let block `blocks[i]` have the centre `vectors[i]` [num_kv_heads, head_dim]."""
        self._drop_unused()
        known: dict[bytes, int] = {}
        for block, vector in zip(blocks, vectors.to(self.vectors), strict=True):
            key = vector.cpu().numpy().tobytes()
            if key not in known:
                known[key] = self._add(vector)
            self.ids[block] = known[key]

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Follow the pool to `num_blocks` blocks, block `src[i]` becoming `dst[i]`."""
        old, self.ids = self.ids, [0] * num_blocks
        for a, b in zip(src, dst, strict=True):
            self.ids[b] = old[a]

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Give block `dst[i]` the centre of block `src[i]`."""
        for a, b in zip(src, dst, strict=True):
            self.ids[b] = self.ids[a]

    def to(self, device: torch.device) -> None:
        """Move the vectors."""
        self.vectors, self._last = self.vectors.to(device), None

    def _learn(self, states: Tensor) -> int:
        """The number of the centre of one row's first states [num_kv_heads, tokens, head_dim]."""
        return self._add(centre_of(states[None, :, :CENTRE_TOKENS])[0])

    def _add(self, vector: Tensor) -> int:
        # The one place that waits for a GPU: once a row, in its first forward.
        if not bool(vector.any()):
            return 0
        with torch.inference_mode(False):
            self.vectors = torch.cat([self.vectors, vector[None].clone()])
        return len(self.vectors) - 1

    def _drop_unused(self) -> None:
        if len(self.vectors) <= _SPARE:
            return
        used = sorted({0, *self.ids})
        if len(self.vectors) <= 2 * len(used):
            return
        renumbered = {number: i for i, number in enumerate(used)}
        self.vectors, self._last = self.vectors[used], None
        self.ids = [renumbered[number] for number in self.ids]

    def _gathered(self, numbers: list[int]) -> Tensor | None:
        if not any(numbers):
            return None
        key = tuple(numbers)
        if self._last is None or self._last[0] != key:
            self._last = key, self.vectors[numbers]
        return self._last[1]
