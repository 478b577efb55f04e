"""Launch attention over sealed and exact blocks: a few queries split over the keys, or a chunk of queries.

The grid is (row tiles of all batch rows, KV heads, splits), fixed by the table's capacity and the batch, as in
`paged_decode`: nothing on the host depends on a length.
"""

from __future__ import annotations

from torch import Tensor

from hf_kvopt.kernels.paged_kv import empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut
from hf_kvopt.kernels.sealed_kv import SealedKV
from hf_kvopt.kernels.triton.arguments import pattern_args
from hf_kvopt.kernels.triton.configs import sealed_config
from hf_kvopt.kernels.triton.launch import Config, Launch, Target, cdiv, next_power_of_two, target_of
from hf_kvopt.kernels.triton.merge_state import plan_merge_state
from hf_kvopt.kernels.triton.paged_decode import MIN_TILES, WORKERS_PER_SM, choose_splits
from hf_kvopt.kernels.triton.prepared import Plan, run_prepared
from hf_kvopt.kernels.triton.sealed_arguments import check_sealed, sealed_args
from hf_kvopt.kernels.triton.sealed_kernel import sealed_attention_kernel
from hf_kvopt.kernels.triton.splits import most_keys, of_splits


def plan_sealed(
    q: Tensor,
    kv: SealedKV,
    pattern: Pattern,
    out: Tensor,
    lse: Tensor,
    target: Target,
    config: Config,
    num_splits: int,
) -> list[Launch]:
    """Write the launches down: the splits, and their merge if there is more than one."""
    batch, num_heads, q_len, _ = q.shape
    row_tiles = cdiv(q_len * num_heads // kv.num_kv_heads, config.block_m)
    parts, part_lse, own = of_splits(pattern, q_len, None, out, lse, num_splits)
    means = None
    if num_splits > 1 and kv.k.mean is not None:
        means = lse.new_empty(lse.numel() * kv.block_table.stride(0))
    args = {
        **sealed_args(q, kv, config, target),
        "means_ptr": means,
        **pattern_args(own),
        "out_ptr": parts,
        "lse_ptr": part_lse,
        "num_batch": batch,
        "row_tiles": row_tiles,
        "num_splits": num_splits,
        "BLOCK_BATCH": next_power_of_two(batch),
        "MIN_SPLIT_TILES": 1 if target.family == "interpret" else MIN_TILES,
        "NUM_WORKERS": WORKERS_PER_SM * target.num_sms,
        "IS_SPLIT": num_splits > 1,
        "HAS_BORDERS": q_len > 1,
        "HAS_WHOLE": num_splits == 1,
    }
    grid = (batch * row_tiles, kv.num_kv_heads, num_splits)
    scratch, constants = ("out_ptr", "lse_ptr", "means_ptr"), ("k_turn_ptr", "v_turn_ptr")
    launches = [Launch(sealed_attention_kernel, grid, args, config.options, scratch, constants)]
    if num_splits > 1:
        launches.append(plan_merge_state(parts, part_lse, pattern.sinks, out, lse))
    return launches


def sealed_attention(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: SealedKV,
    pattern: Pattern,
    *,
    few: bool,  # whether the keys are split over programs, as few queries need
    config: Config | None = None,
    num_splits: int | None = None,
) -> AttentionOut:
    """Attend to all tokens of each row, each query to the form that its position says.

    What few queries read exact has a place; many queries find their own tokens among the new states.
    """

    def plan() -> Plan:
        return _planned(q, kv, pattern, few, config, num_splits)

    k, v, *tables, first_block, depths = kv
    codecs = (k.codec, v.codec)
    inputs = (q, *k[:4], k.new, *v[:4], v.new, *tables, depths, pattern.sinks, pattern.starts, pattern.mask)
    settings = ("sealed_attention", *pattern[:4], *codecs, first_block == 0, few, config, num_splits)
    return AttentionOut(*run_prepared(inputs, settings, plan))


def _planned(
    q: Tensor, kv: SealedKV, pattern: Pattern, few: bool, config: Config | None, num_splits: int | None
) -> Plan:
    """Check the arguments of `sealed_attention`, choose the tiles and splits, and write the launches down."""
    target = target_of(q)
    check_sealed(q, kv, pattern)
    out, lse = empty_results(q, kv.v.dim)
    if not out.numel():
        return Plan((), (out, lse))
    batch, num_heads, q_len, k_dim = q.shape
    num_rows = q_len * num_heads // kv.num_kv_heads
    config = config or sealed_config(
        max(k_dim, kv.v.dim),
        q.dtype,
        kv.block_size,
        num_rows,
        pattern.has_mask,
        few,
        kv.v.codec.num_groups(kv.v.dim) > 1,
        target,
    )
    if num_splits is None:
        row_tiles = cdiv(num_rows, config.block_m)
        keys = most_keys(pattern, q_len, kv.capacity)
        splits = choose_splits(batch, kv.num_kv_heads, row_tiles, keys, config.block_n, target)
        num_splits = splits if few else 1
    return Plan(plan_sealed(q, kv, pattern, out, lse, target, config, num_splits), (out, lse))
