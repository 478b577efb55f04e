"""Seal full blocks: turn, centre and quantize the tokens of each, from its exact place or from the states of a step.

    y = x H - mean        code = round(y / s + middle)        s: the nearest of a few ranges for each token and group

One program per block and KV head, of keys and of values. It gives the bytes that `quant.sealed.seal` gives.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_kvopt.kernels.sealed_kv import BothForms, Full
from hf_kvopt.kernels.triton.arguments import strides_of
from hf_kvopt.kernels.triton.launch import Launch, next_power_of_two
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.seal_tile import seal_one
from hf_kvopt.kernels.triton.sealed_arguments import check_forms
from hf_kvopt.quant.sealed import LIMIT, RANGES
from hf_kvopt.quant.sealed_formats import BlockCodec

NUM_RANGES = 5


def can_seal(codec: BlockCodec, dim: int) -> bool:
    """Return whether the kernel takes a codec: groups of channels must be powers of two."""
    num_groups = codec.num_groups(dim)
    size = dim // num_groups
    return len(RANGES[codec.bits]) <= NUM_RANGES and (num_groups == 1 or not size & (size - 1))


@triton.jit(do_not_specialize=["num_blocks"])
def _seal_blocks_kernel(
    blocks_ptr,
    places_ptr,
    rows_ptr,
    firsts_ptr,
    num_blocks,
    k_ptr,
    v_ptr,
    k_exact_ptr,
    v_exact_ptr,
    k_codes_ptr,
    v_codes_ptr,
    k_token_ptr,
    v_token_ptr,
    k_mean_ptr,
    v_mean_ptr,
    turned_ptr,  # [num_blocks, num_kv_heads, SIZE * (K_DIM + V_DIM)] float32
    scratch_ptr,  # [num_blocks, num_kv_heads, SIZE * (K_DIM + V_DIM)] bytes
    k_turn_scale,
    v_turn_scale,
    k_r0,
    k_r1,
    k_r2,
    k_r3,
    k_r4,
    v_r0,
    v_r1,
    v_r2,
    v_r3,
    v_r4,
    stride_k_b,
    stride_k_h,
    stride_k_m,
    stride_v_b,
    stride_v_h,
    stride_v_m,
    NUM_KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per block and KV head, of keys (0) or of values (1)."""
    pid = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    block = tl.load(blocks_ptr + pid)
    if block >= 0:
        place = tl.load(places_ptr + pid)
        row = tl.load(rows_ptr + pid)
        first = tl.load(firsts_ptr + pid)
        scratch_ptr += (pid * NUM_KV_HEADS + kv_head) * SIZE * (K_DIM + V_DIM)
        turned_ptr += (pid * NUM_KV_HEADS + kv_head) * SIZE * (K_DIM + V_DIM)
        if tl.program_id(2) == 0:
            seal_one(
                block, place, kv_head, k_ptr + row * stride_k_b + kv_head * stride_k_h + first * stride_k_m,
                stride_k_m, k_exact_ptr, k_codes_ptr, k_token_ptr, k_mean_ptr, k_turn_scale, turned_ptr, scratch_ptr,
                k_r0, k_r1, k_r2, k_r3, k_r4, NUM_KV_HEADS, SIZE, K_DIM, K_BLOCK, K_GROUP, K_BITS, LIMIT, K_TURN,
                BLOCK_T,
            )  # fmt: skip
        else:
            seal_one(
                block, place, kv_head, v_ptr + row * stride_v_b + kv_head * stride_v_h + first * stride_v_m,
                stride_v_m, v_exact_ptr, v_codes_ptr, v_token_ptr, v_mean_ptr, v_turn_scale,
                turned_ptr + SIZE * K_DIM, scratch_ptr + SIZE * K_DIM,
                v_r0, v_r1, v_r2, v_r3, v_r4, NUM_KV_HEADS, SIZE, V_DIM, V_BLOCK, V_GROUP, V_BITS, LIMIT, V_TURN,
                BLOCK_T,
            )  # fmt: skip


def plan_seal_blocks(k: BothForms, v: BothForms, full: Full) -> Launch:
    """Write the launch down; see `seal_blocks`."""
    num_blocks = full.blocks.shape[0]
    _, size, num_kv_heads, _ = k.exact.shape
    room = num_blocks * num_kv_heads * size * (k.dim + v.dim)
    args: dict[str, Any] = {
        "blocks_ptr": full.blocks,
        "places_ptr": full.places,
        "rows_ptr": full.rows,
        "firsts_ptr": full.firsts,
        "num_blocks": num_blocks,
        "turned_ptr": torch.empty(room, dtype=torch.float32, device=k.exact.device),
        "scratch_ptr": torch.empty(room, dtype=torch.uint8, device=k.exact.device),
        "NUM_KV_HEADS": num_kv_heads,
        "SIZE": size,
        "LIMIT": LIMIT,
        "BLOCK_T": 16,
        **_side_args("k", k),
        **_side_args("v", v),
    }
    # A product and a sum in one instruction would round otherwise than the reference.
    num_warps = 4 if max(args["K_BLOCK"], args["V_BLOCK"]) <= 128 else 8
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return Launch(_seal_blocks_kernel, (num_blocks, num_kv_heads, 2), args, options)


def seal_blocks(
    k: BothForms,  # `new` are the states of the step, [batch, num_kv_heads, tokens, dim]
    v: BothForms,
    full: Full,
) -> None:
    """Seal `full` blocks in place. A block number of -1 is skipped."""
    for name, x in (("k", k), ("v", v)):
        check_forms(name, x, x.exact, x.dim, k.exact.shape[2], k.exact.shape[1])
    if full.blocks.shape[0]:
        plan_seal_blocks(k, v, full).run()


def _side_args(name: str, x: BothForms) -> dict[str, Any]:
    turn = x.dim & -x.dim if x.codec.rotates else 1
    states, upper, block = x.new if x.new is not None else x.exact, name.upper(), max(16, next_power_of_two(x.dim))
    num_groups, shares = x.codec.num_groups(x.dim), RANGES[x.codec.bits]
    shares = (*shares, *[shares[-1]] * (NUM_RANGES - len(shares)))
    return {
        f"{name}_ptr": states,
        **strides_of(name, states, "bhm"),
        f"{name}_exact_ptr": x.exact,
        f"{name}_codes_ptr": x.codes,
        f"{name}_token_ptr": x.token,
        f"{name}_mean_ptr": x.mean,
        f"{name}_turn_scale": turn**-0.5,
        f"{upper}_TURN": turn,
        **{f"{name}_r{i}": share for i, share in enumerate(shares)},
        f"{upper}_DIM": x.dim,
        f"{upper}_BLOCK": block,
        f"{upper}_GROUP": block if num_groups == 1 else x.dim // num_groups,
        f"{upper}_BITS": x.codec.bits,
    }
