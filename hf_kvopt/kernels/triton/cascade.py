"""Decode over tokens that rows share, read once for all of them, and over those of each row alone (cascade attention).

    q [batch, num_heads, q_len, dim]  ->  [runs, num_heads, rows of a run * q_len, dim]     a view

    shared part   a row for each run: its queries are the queries of all its rows        splits 0 .. s
    own part      each row from the shared tokens on                                     splits s .. s + t
    merge         over all splits of a row, as for any decode (merge_state.py)

Both parts are the decode kernel, and their splits lie in one scratch: what a run's queries are to the shared part are,
in the same memory, the queries of its rows. Hydragen: Juravsky et al., 2024.
"""

from __future__ import annotations

from torch import Tensor

from hf_kvopt.kernels.paged_kv import PagedKV, empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut
from hf_kvopt.kernels.triton.checks import check_paged
from hf_kvopt.kernels.triton.configs import decode_config, shared_config
from hf_kvopt.kernels.triton.launch import Launch, Target, cdiv, target_of
from hf_kvopt.kernels.triton.merge_state import plan_merge_state
from hf_kvopt.kernels.triton.paged_decode import WORKERS_PER_SM, choose_splits, paged_decode, plan_splits
from hf_kvopt.kernels.triton.splits import of_splits

# Working programs per multiprocessor where a tile has as many rows: each split writes the output of all of them, which
# at eight (64 splits of 8,192 tokens) would be more bytes than the keys and values.
TALL, TALL_WORKERS_PER_SM = 64, 2


def decode(q: Tensor, kv: PagedKV, pattern: Pattern) -> AttentionOut:
    """Attend as `paged_decode` does, reading once what rows share where that can be."""
    return cascade(q, kv, pattern) if can_share(kv, pattern, q.shape[2]) else paged_decode(q, kv, pattern)


def cascade(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: PagedKV,  # with `shared`
    pattern: Pattern,
) -> AttentionOut:
    """Attend as `paged_decode` does, reading once what rows share."""
    target = target_of(q)
    check_paged(q, kv, pattern, target)
    out, lse = empty_results(q, kv.v_dim)
    if out.numel():
        for launch in plan_cascade(q, kv, pattern, out, lse, target):
            launch.run()
    return AttentionOut(out, lse)


def can_share(kv: PagedKV, pattern: Pattern, q_len: int) -> bool:
    """Return whether what rows share can be read once: a mask of several queries a row has no view by runs."""
    return kv.shared is not None and (pattern.mask is None or q_len == 1)


def plan_cascade(
    q: Tensor, kv: PagedKV, pattern: Pattern, out: Tensor, lse: Tensor, target: Target
) -> tuple[Launch, Launch, Launch]:
    """Write the launches down: the shared part, the own part, their merge."""
    assert kv.shared is not None
    batch, num_heads, q_len, k_dim = q.shape
    runs = len(kv.shared)
    size = batch // runs
    group, widest = num_heads // kv.num_kv_heads, max(k_dim, kv.v_dim)
    tiles, splits = [], []
    for choose, rows, num_rows in ((shared_config, runs, size * q_len * group), (decode_config, batch, q_len * group)):
        config = choose(widest, q.dtype, kv.formats, num_rows, pattern.has_mask, target)
        row_tiles = cdiv(num_rows, config.block_m)
        tiles.append(config)
        splits.append(choose_splits(rows, kv.num_kv_heads, row_tiles, kv.capacity, config.block_n, target))
    parts, flat_lse, own = of_splits(pattern, q_len, None, out, lse, sum(splits))
    # By query and head, as the output: then the queries of a run lie as those of its rows.
    by_query = flat_lse.view(-1, batch, q_len, num_heads)
    s = splits[0]
    shared_part = plan_splits(
        q.unflatten(0, (runs, size)).transpose(1, 2).flatten(2, 3),
        kv._replace(block_table=kv.block_table[::size], seq_lens=kv.shared, shared=None),
        _of_runs(own, runs, size),
        parts[:s].view(s, runs, size * q_len, num_heads, -1),
        by_query[:s].view(s, runs, size * q_len, num_heads).transpose(2, 3),
        target, tiles[0], s, WORKERS_PER_SM if tiles[0].block_m < TALL else TALL_WORKERS_PER_SM,
    )  # fmt: skip
    part_lse = by_query.transpose(2, 3)
    own_part = plan_splits(q, kv, own, parts[s:], part_lse[s:], target, tiles[1], splits[1])
    return shared_part, own_part, plan_merge_state(parts, part_lse, pattern.sinks, out, lse)


def _of_runs(pattern: Pattern, runs: int, size: int) -> Pattern:
    """Return the pattern of the queries of whole runs, all of which come behind the tokens that they share."""
    starts, mask = pattern.starts, pattern.mask
    if mask is not None and len(mask) > 1:
        mask = mask.unflatten(0, (runs, size)).squeeze(3).transpose(1, 2)
    if starts is not None:
        assert isinstance(starts, Tensor)
        starts = starts[::size].contiguous()
    return pattern._replace(is_causal=False, window=None, starts=starts, mask=mask)
