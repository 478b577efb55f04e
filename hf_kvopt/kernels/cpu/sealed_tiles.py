"""Attention over a layer whose full blocks are sealed: the queries of one block read alike, so they go together.

    dense buffer of a row    [ exact | sealed ... sealed | exact exact ]      queries of block i
                             [ exact | sealed ... sealed | sealed | exact exact ]      queries of block i + 1

From one block of queries to the next, one block of the buffer turns into what is stored. A row's blocks are aligned to
its own first token, so rows that stand at unlike places are taken one by one.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from hf_kvopt.kernels.calls import AttentionCall
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.cpu.sealed import SealedRows, attend_sealed_blocks, can_attend_sealed
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_view import SealedView

logger = logging.getLogger(__name__)

# Blocks of queries, in a row of which all that they read exact has a place; see `quant.sealed_formats.tail_blocks`.
_FEW_BLOCKS = 3


def accepts(call: AttentionCall) -> bool:
    """Take calls over layers whose blocks are sealed."""
    return isinstance(call.k, SealedView) and isinstance(call.v, SealedView)


def run(call: AttentionCall) -> Tensor:
    """Return attention [batch, q_len, num_heads, v_head_dim] in which each query reads what its position says.

    The pattern's `starts` and `mask` count columns, as for `attend`; its sinks may differ by query.
    """
    query, key, value, pattern, dropout = call
    assert isinstance(key, SealedView)
    assert isinstance(value, SealedView)
    if runs_kernel(query):
        _say_once()
    key.check_valid()
    if key.states is not None and value.states is not None:
        return attend(query, key.states, value.states, pattern, dropout)
    q_len, mask = query.shape[2], pattern.mask
    if not pattern.is_causal and (mask is None or (mask.shape[2] == 1 and q_len > 1)):
        # Nothing says in which order the queries stand: all read as the last one does.
        return attend(query, key.dense(), value.dense(), pattern, dropout)
    if q_len <= _FEW_BLOCKS * key.table.block_size and not dropout:
        k, v = key.storage.sealed_place, value.storage.sealed_place
        if k is not None and v is not None and can_attend_sealed(query, k, v):
            return attend_sealed_blocks(query, k, v, _rows_of(key), pattern, _depths(pattern, q_len))
    rows = range(query.shape[0])
    if not key.table.is_ragged:
        return _attend_rows(query, key, value, pattern, dropout, rows)
    parts = [_attend_rows(query[i : i + 1], key, value, _of_row(pattern, i), dropout, [i]) for i in rows]
    return torch.cat(parts)


def _depths(pattern: Pattern, q_len: int) -> Tensor | None:
    """[q_len] int32: by how much each query's position is behind that of the first, where it is not its number.

    Nodes of a tree of drafts stand behind one another in the cache, and see their ancestors among them alone.
    """
    mask = pattern.mask
    if pattern.is_causal or mask is None or mask.shape[2] != q_len or q_len == 1 or len(mask) > 1:
        return None
    new = mask[0, 0, :, -q_len:]
    seen = new if new.dtype == torch.bool else new > torch.finfo(new.dtype).min
    depths = seen.sum(dim=1).sub_(1).clamp_(min=0).minimum(torch.arange(q_len, device=seen.device))
    return depths.to(torch.int32)


def _rows_of(key: SealedView) -> SealedRows:
    block_table, seq_lens, lags = key.row_tensors()
    first_block = key.table.first_block
    return SealedRows(
        block_table, key.table.exact_table(key.storage.exact.device), seq_lens, lags, key.skip, first_block
    )


def _attend_rows(
    query: Tensor,
    key: SealedView,
    value: SealedView,
    pattern: Pattern,
    dropout: float,
    rows: Sequence[int],
) -> Tensor:
    """Attention of rows that begin at the same column."""
    table, kv_len, q_len = key.table, key.spec.shape[2], query.shape[2]
    lag, size = table.lags[rows[0]], table.block_size
    # The row's token in the first column, negative where it has none there.
    first = table.base - table.origin + key.skip - lag
    hidden = min(kv_len, max(0, -first))
    start = max(first, 0)
    past = first + kv_len - q_len  # token of the first query
    unheld = min(q_len, max(0, hidden - (kv_len - q_len)))  # queries in columns before the row's first token
    out = query.new_zeros(query.shape[0], q_len, query.shape[1], value.spec.shape[3])
    if unheld == q_len:
        return out
    tile = (past + unheld) // size
    buffers = [_Buffer(view, rows, start, first + kv_len, tile, q_len) for view in (key, value)]
    depths = _depths(pattern, q_len) if q_len <= _FEW_BLOCKS * size else None
    of_block = _by_block(range(q_len) if depths is None else depths.tolist(), past, unheld, size)
    for block, queries in sorted(of_block.items()):
        for buffer in buffers:
            buffer.turn(block)
        end = past + queries[-1] + 1 if pattern.is_causal else first + kv_len
        part = _cut(pattern, queries, slice(hidden, hidden + end - start), hidden)
        k, v = (buffer.states[:, :, : end - start] for buffer in buffers)
        out[:, queries] = attend(query[:, :, queries], k, v, part, dropout)
    return out


def _by_block(depths: Sequence[int], past: int, first: int, block_size: int) -> dict[int, list[int]]:
    """The queries from number `first` on, by the block that each stands in."""
    found: dict[int, list[int]] = {}
    for i in range(first, len(depths)):
        found.setdefault((past + depths[i]) // block_size, []).append(i)
    return found


@cache
def _say_once() -> None:
    logger.warning("there is no Triton kernel for sealed blocks yet: they are read by PyTorch's operations")


class _Buffer:
    """Keys or values of some rows from token `start` to `stop`, as one block of queries after the other reads them."""

    def __init__(self, view: SealedView, rows: Sequence[int], start: int, stop: int, tile: int, num_new: int) -> None:
        self.plane = view.storage
        self.table, self.rows, self.start, self.tile = view.table, list(rows), start, tile
        size = self.plane.block_size
        first = start // size
        held = self.plane.read_blocks(self.table, self.rows, first, -(-stop // size), tile)
        self.states = held[:, :, start - first * size : stop - first * size]
        if view.arrived is not None:
            new = view.arrived[self.rows] if len(self.rows) < len(view.arrived) else view.arrived
            begin = max(start, stop - num_new)
            self.states[:, :, begin - start :] = new[:, :, new.shape[2] - (stop - begin) :]

    def turn(self, tile: int) -> None:
        """Let the buffer be what queries of block `tile` read."""
        size = self.plane.block_size
        base = self.table.first_block
        for block in range(max(1, self.tile - 1), tile - 1):
            numbers = torch.tensor([self.table.rows[row][block - base] for row in self.rows], device=self.states.device)
            begin, stop = max(block * size, self.start), (block + 1) * size
            sealed = self.plane.unsealed(numbers)[:, :, begin - block * size :]
            if begin < stop:
                self.states[:, :, begin - self.start : stop - self.start] = sealed
        self.tile = tile


def _of_row(pattern: Pattern, row: int) -> Pattern:
    """The pattern of one row of a batch."""
    starts, mask, sinks = pattern.starts, pattern.mask, pattern.sinks
    return pattern._replace(
        starts=None if starts is None else [int(starts[row])],
        mask=mask if mask is None or len(mask) == 1 else mask[row : row + 1],
        sinks=sinks if sinks is None or sinks.dim() == 1 or len(sinks) == 1 else sinks[row : row + 1],
    )


def _cut(pattern: Pattern, queries: list[int], columns: slice, hidden: int) -> Pattern:
    """The pattern between some queries and some columns, of which `hidden` lie before them."""
    starts, mask, sinks = pattern.starts, pattern.mask, pattern.sinks
    if starts is not None:
        starts = [max(0, int(start) - hidden) for start in starts]
    if mask is not None:
        mask = (mask[:, :, queries] if mask.shape[2] > 1 else mask)[..., columns]
    if sinks is not None and sinks.dim() == 4 and sinks.shape[2] > 1:
        sinks = sinks[:, :, queries]
    return pattern._replace(starts=starts, mask=mask, sinks=sinks)
