"""Checks of the sealed attention op, and what its values become as arguments of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import BothForms, SealedKV, turning
from hf_kvopt.kernels.triton.arguments import strides_of
from hf_kvopt.kernels.triton.checks import (
    COMPUTE_DTYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_head_dim,
    check_last_contiguous,
    check_pattern,
    check_shape,
    check_table_values,
    debug_enabled,
)
from hf_kvopt.kernels.triton.launch import Config, Target, dot_dtype, next_power_of_two


def sealed_args(q: Tensor, kv: SealedKV, config: Config, target: Target) -> dict[str, Any]:
    """Return queries, both forms and tile sizes as arguments of the kernel, by parameter name."""
    k, v = kv.k, kv.v
    is_half = q.dtype != torch.float32
    return {
        "q_ptr": q,
        **_form_args("k", k),
        **_form_args("v", v),
        "k_mean_ptr": k.mean,
        "new_len": 0 if v.new is None else v.new.shape[2],
        "block_table_ptr": kv.block_table,
        "exact_table_ptr": kv.exact_table,
        "seq_lens_ptr": kv.seq_lens,
        "depths_ptr": kv.depths,
        "q_len": q.shape[2],
        "sealed_lo": kv.block_size if kv.first_block == 0 else 0,
        **strides_of("q", q, "bhm"),
        "stride_table_b": kv.block_table.stride(0),
        "stride_places_b": kv.exact_table.stride(0),
        "NUM_KV_HEADS": kv.num_kv_heads,
        "GROUP": q.shape[1] // kv.num_kv_heads,
        "V_GROUPS": v.codec.num_groups(v.dim),
        "V_FACTORED": _is_factored(v),
        "K_BIASED": is_half and target.family != "cdna3",
        "PTX": target.family.startswith("sm"),
        "BLOCK_SIZE": kv.block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IN_DTYPE": dot_dtype(q.dtype, target),
        "Q_DTYPE": dot_dtype(torch.float16 if is_half else q.dtype, target),
        "P_DTYPE": dot_dtype(torch.bfloat16 if is_half else q.dtype, target),
    }


def _form_args(name: str, x: BothForms) -> dict[str, Any]:
    """Return keys ("k") or values ("v") in both forms as arguments of the kernel."""
    turn = turning(x.dim, x.codec.rotates, x.exact.device)
    upper = name.upper()
    strides = (0, 0, 0) if x.new is None else x.new.stride()[:3]
    return {
        # As `sealed_codes` reads them.
        f"{name}_codes_ptr": x.codes.view(torch.int16) if x.codec.bits in (4, 8) else x.codes,
        f"{name}_token_ptr": x.token,
        f"{name}_exact_ptr": x.exact,
        f"{name}_turn_ptr": turn.signs,
        f"{name}_turn_scale": turn.scale,
        f"{name}_new_ptr": x.new,
        **{f"stride_{name}n_{axis}": stride for axis, stride in zip("bhm", strides, strict=True)},
        f"{upper}_DIM": x.dim,
        # A product's operands have 16 channels a plane at least.
        f"{upper}_BLOCK": max(64, next_power_of_two(x.dim)),
        f"{upper}_BITS": x.codec.bits,
    }


def _is_factored(v: BothForms) -> bool:
    """Return whether s of a token is the same for all channels of a plane of its values."""
    num_groups = v.codec.num_groups(v.dim)
    return v.codec.bits < 8 and (num_groups == 1 or (v.codec.bits < 4 and num_groups in (2, 4)))


def check_sealed(q: Tensor, kv: SealedKV, pattern: Pattern) -> None:
    """Check every argument of the sealed attention op."""
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    check_last_contiguous("q", q)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, block_size = kv.num_kv_heads, kv.block_size
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16: got {block_size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {num_kv_heads}: got {num_heads}")
    check_forms("k", kv.k, q, head_dim, num_kv_heads, block_size)
    if kv.k.codec.num_groups(head_dim) != 1:
        raise ValueError(f"sealed keys must have one group of channels: got {kv.k.codec}; use the PyTorch path")
    check_forms("v", kv.v, q, kv.v.dim, num_kv_heads, block_size)
    if kv.v.mean is not None:
        raise ValueError("sealed values must not be centred: got a mean; use the PyTorch path")
    for name, table in (("block_table", kv.block_table), ("exact_table", kv.exact_table)):
        check_shape(name, table, (batch, kv.block_table.shape[1]))
        check_dtype(name, table, torch.int32)
        check_last_contiguous(name, table)
        check_device(name, table, q)
    check_shape("seq_lens", kv.seq_lens, (batch,))
    check_dtype("seq_lens", kv.seq_lens, torch.int32)
    check_device("seq_lens", kv.seq_lens, q)
    if kv.depths is not None:
        check_shape("depths", kv.depths, (q_len,))
        check_dtype("depths", kv.depths, torch.int32)
    check_pattern(pattern, q)
    if debug_enabled():
        check_table_values(kv.block_table, kv.seq_lens, kv.v.codes.shape[0], block_size)
        check_table_values(kv.exact_table, kv.seq_lens, kv.v.exact.shape[0], block_size)


def check_forms(name: str, x: BothForms, q: Tensor, dim: int, num_kv_heads: int, block_size: int) -> None:
    """Check keys or values in both forms beside a tensor `q` of the same dtype on the same device."""
    check_head_dim(f"{name}'s head_dim", dim)
    slots = (block_size, num_kv_heads)
    check_shape(f"{name}_codes", x.codes, (None, *slots, x.codec.width(dim)))
    check_shape(f"{name}_token", x.token, (x.codes.shape[0], *slots, x.codec.num_groups(dim)))
    check_shape(f"{name}_exact", x.exact, (None, *slots, dim))
    check_dtype(f"{name}_codes", x.codes, torch.uint8)
    check_dtype(f"{name}_token", x.token, torch.float16)
    check_dtype(f"{name}_exact", x.exact, q.dtype)
    parts = {"codes": x.codes, "token": x.token, "exact": x.exact}
    if x.mean is not None:
        check_shape(f"{name}_mean", x.mean, (x.codes.shape[0], num_kv_heads, dim))
        parts["mean"] = x.mean
    for part, tensor in parts.items():
        check_contiguous(f"{name}_{part}", tensor)
        check_device(f"{name}_{part}", tensor, q)
    if x.new is not None:
        check_shape(f"{name}_new", x.new, (None, num_kv_heads, None, dim))
        check_dtype(f"{name}_new", x.new, q.dtype)
        check_last_contiguous(f"{name}_new", x.new)
