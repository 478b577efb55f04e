"""Centres: which constant was taken from the keys of each block before they were stored.

A block belongs to rows that share their first tokens, and so their centre: the number of the centre is kept by block
and follows it through forks, beams, prefixes and relayouts. Number 0 is no shift at all, which is all that most models
ever see; then nothing here touches a tensor.

A row's centre is that of its first `CENTRE_TOKENS` tokens, however they came in. Where fewer come first, they are
stored by what they alone show, and their keys are kept as they came until the rest is there; if that shows another
centre, they are stored once more from those. One token alone misleads: an attention sink, mostly the start token, has
keys unlike all others (with three loud channels of its own int4 lost 7 % of perplexity where 16 tokens lost 1 %).
For the same reason padding on the left is left out, where it is seen by its keys, which are all the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.quant import CENTRE_TOKENS, centre_of

# From so many centres on, those that no block refers to are thrown out once they are the most.
_SPARE = 64
_SAME = 1e-3  # of a key's largest channel: what rounding may make of one key in two places


class Anew(NamedTuple):
    """The first tokens of a row, to be stored once more by the row's centre."""

    row: int
    block: int
    keys: Tensor  # [num_kv_heads, tokens, head_dim] as they came


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
        # By a row's first block: keys of rows that began with too few tokens, [num_kv_heads, tokens, head_dim].
        self.early: dict[int, Tensor] = {}
        self._last: tuple[tuple[int, ...], Tensor] | None = None

    def of_rows(self, table: BlockTable) -> Tensor | None:
        """Return [batch, num_kv_heads, head_dim] float32; None where no row has a shift."""
        return self._gathered([self.ids[row[-1]] if row else 0 for row in table.rows])

    @property
    def tensors(self) -> list[Tensor]:
        """All that holds memory."""
        return [self.vectors, *self.early.values()]

    def before_write(
        self, states: Tensor, table: BlockTable, start: int, stop: int
    ) -> tuple[Tensor | None, list[Anew]]:
        """The centres of the rows for states [batch, num_kv_heads, tokens, head_dim] that end at column `stop`.

        Of these the columns from `start` on are written: what a window drops at once is not. A row that begins here
        learns its centre from its first states, dropped or not; the others go on with that of the block before. Beside
        them what is to be stored anew, in blocks that this write owns.
        """
        self._drop_unused()
        numbers, anew = [], []
        begin = stop - states.shape[2]
        is_first = stop > start == table.base and begin <= max(table.lags, default=0)
        pads = num_pads(states) if is_first else [0] * len(table.rows)
        for i, (row, lag) in enumerate(zip(table.rows, table.lags, strict=True)):
            first = table.base + lag  # the column of the row's first slot
            past, last = start - first, stop - first
            if last <= 0:
                numbers.append(0)
                continue
            # Tokens of the row, those that slid out of a window included; a policy leaves some of any that it had.
            seen = begin - lag if table.policy is None else past
            # Where a window slid beyond all that a row held, it goes on with the centre that it had.
            slid = table.retired.rows[i] if table.retired is not None and past <= 0 < seen else []
            held = row[(past - 1) // table.block_size :] if past > 0 else slid[-1:]
            number = self.ids[held[0]] if held else 0
            skipped = pads[i] if not past and seen <= 0 else 0
            known = self._first_tokens(states[i, :, skipped:], (slid or row)[0], seen)
            if known is not None and (seen <= 0 or known.shape[1] == CENTRE_TOKENS):
                before, number = number, self._learn(known, number)
                if past > 0 and number != before:
                    anew.append(Anew(i, row[0], known[:, first - lag : start - lag]))
            for block in row[max(0, past) // table.block_size : -(-last // table.block_size)]:
                self.ids[block] = number
                self.early.pop(block, None)
            # Behind padding the first tokens may lie in blocks that are shared by then: they stay as they are.
            if known is not None and known.shape[1] < CENTRE_TOKENS and not skipped:
                self.early[row[0]] = known.clone()
            numbers.append(number)
        return self._gathered(numbers), anew

    def go_on(self, table: BlockTable) -> None:
        """Let the newest block of each row, whose centre is learned, have the one of the block before."""
        for row in table.rows:
            if len(row) > 1:
                self.ids[row[-1]] = self.ids[row[-2]]
                self.early.pop(row[-1], None)

    def of_blocks(self, blocks: list[int]) -> Tensor:
        """Return [len(blocks), num_kv_heads, head_dim] float32."""
        return self.vectors[[self.ids[block] for block in blocks]]

    def put_blocks(self, blocks: list[int], vectors: Tensor) -> None:
        """Let block `blocks[i]` have the centre `vectors[i]` [num_kv_heads, head_dim]."""
        self._drop_unused()
        known: dict[bytes, int] = {}
        for block, vector in zip(blocks, vectors.to(self.vectors), strict=True):
            key = vector.cpu().numpy().tobytes()
            if key not in known:
                known[key] = self._add(vector) if bool(vector.any()) else 0
            self.ids[block] = known[key]
            self.early.pop(block, None)

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Follow the pool to `num_blocks` blocks, block `src[i]` becoming `dst[i]`."""
        old, self.ids = self.ids, [0] * num_blocks
        early, self.early = self.early, {}
        for a, b in zip(src, dst, strict=True):
            self.ids[b] = old[a]
            if a in early:
                self.early[b] = early[a]

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Give block `dst[i]` the centre that block `src[i]` had."""
        held = [(self.ids[block], self.early.get(block)) for block in src]
        for block, (number, early) in zip(dst, held, strict=True):
            self.ids[block] = number
            self.early.pop(block, None)
            if early is not None:
                self.early[block] = early

    def move_slots(self, src: list[int], dst: list[int], block_size: int) -> None:
        """Follow tokens that are copied from slots `src` to `dst`."""
        for block, keys in self.early.items():
            moved = [
                (a % block_size, b % block_size) for a, b in zip(src, dst, strict=True) if b // block_size == block
            ]
            if moved:
                # The tensor may be that of a fork, too.
                self.early[block] = keys.clone()
                self.early[block][:, [b for _, b in moved]] = keys[:, [a for a, _ in moved]]

    def to(self, device: torch.device) -> None:
        """Move the vectors."""
        self.vectors, self._last = self.vectors.to(device), None
        self.early = {block: keys.to(device) for block, keys in self.early.items()}

    def _first_tokens(self, states: Tensor, block: int, past: int) -> Tensor | None:
        """Keys [num_kv_heads, tokens, head_dim] of a row's first tokens, now that `states` come behind `past` of them;
        None where they were learned from before, or where some were written without this being asked."""
        if past <= 0:
            return states[:, -past : CENTRE_TOKENS - past]
        early = self.early.pop(block, None) if self.early else None
        if early is None or early.shape[1] < past:
            return None
        return torch.cat([early[:, :past], states[:, : CENTRE_TOKENS - past]], dim=1)

    def _learn(self, first: Tensor, number: int) -> int:
        """The number of the centre of one row's first tokens; `number` where it is that one."""
        centre = centre_of(first[None])[0]
        # The one place that waits for a GPU, but for padding: once a row, when its first tokens are there.
        is_known, is_shift = torch.stack(((centre == self.vectors[number]).all(), centre.any())).tolist()
        if is_known:
            return number
        return self._add(centre) if is_shift else 0

    def _add(self, vector: Tensor) -> int:
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


def num_pads(states: Tensor) -> list[int]:
    """Tokens that each row of states [batch, num_kv_heads, tokens, head_dim] begins with and whose keys are all the
    same: padding, which is one token many times over; 0 where all are."""
    first = states[:, :, :1]
    is_same = (states - first).abs().amax(dim=(1, 3)) <= _SAME * first.abs().amax(dim=(1, 3))
    counts = is_same.long().cumprod(dim=1).sum(dim=1).tolist()
    return [count if 1 < count < states.shape[2] else 0 for count in counts]
