"""Arguments of a kernel, from the values of a call: one dictionary by parameter name for each part of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import LOG2E, Pattern
from hf_kvopt.kernels.triton.launch import Config, Target, dot_dtype, next_power_of_two
from hf_kvopt.quant import Format


def pattern_args(pattern: Pattern) -> dict[str, Any]:
    """Return the pattern as arguments of a kernel, by parameter name; scores are in base 2."""
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    return {
        "starts_ptr": starts,
        "mask_ptr": mask,
        "sinks_ptr": sinks,
        "score_scale": scale * LOG2E if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2E,
        "window": window or 0,
        "mask_len": 0 if mask is None else mask.shape[3],
        **_mask_strides(mask),
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": window is not None,
        "HAS_CAP": softcap is not None,
        "MASK_MIN": 0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
    }


def _mask_strides(mask: Tensor | None) -> dict[str, int]:
    """Return the mask's strides, 0 along every axis that broadcasts."""
    names = ("stride_mask_b", "stride_mask_h", "stride_mask_m", "stride_mask_n")
    if mask is None:
        return dict.fromkeys(names, 0)
    broadcast = [0 if n == 1 else s for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    return dict(zip(names, (*broadcast, mask.stride(3)), strict=True))


def strides_of(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """Return the strides of the first three axes by kernel parameter, `stride_<name>_<axis>`."""
    return {f"stride_{name}_{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def paged_args(q: Tensor, kv: PagedKV, config: Config, target: Target) -> dict[str, Any]:
    """Return queries, pools and tile sizes as arguments of a kernel, by parameter name."""
    k_format, v_format = kv.formats
    k_dim, v_dim = q.shape[3], kv.v_dim
    q_dtype, p_dtype = _operand(q.dtype, k_format, torch.float16), _operand(q.dtype, v_format, torch.bfloat16)
    return {
        "q_ptr": q,
        "k_ptr": _as_stored(kv.k_pool, k_format),
        "v_ptr": _as_stored(kv.v_pool, v_format),
        "k_scale_ptr": kv.k_scale,
        "v_scale_ptr": kv.v_scale,
        "block_table_ptr": kv.block_table,
        "seq_lens_ptr": kv.seq_lens,
        "q_len": q.shape[2],
        **strides_of("q", q, "bhm"),
        "stride_table_b": kv.block_table.stride(0),
        "NUM_KV_HEADS": kv.num_kv_heads,
        "GROUP": q.shape[1] // kv.num_kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        # A product's operands have 16 channels a plane at least.
        "K_BLOCK": max(16 * _planes(k_format), next_power_of_two(k_dim)),
        "V_BLOCK": max(16 * _planes(v_format), next_power_of_two(v_dim)),
        "K_PLANES": _planes(k_format),
        "V_PLANES": _planes(v_format),
        "K_CODES": k_format.name,
        "V_CODES": v_format.name,
        "K_BIASED": k_format.name in ("int8", "int4") and q_dtype == torch.float16 and target.family != "cdna3",
        "PTX": target.family.startswith("sm"),
        "BLOCK_SIZE": kv.k_pool.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "Q_DTYPE": dot_dtype(q_dtype, target),
        "P_DTYPE": dot_dtype(p_dtype, target),
    }


def _operand(dtype: torch.dtype, fmt: Format, quantized: torch.dtype) -> torch.dtype:
    """Return the dtype of products with stored values: the queries', float32 or what codes are turned into."""
    return quantized if fmt.has_scale and dtype != torch.float32 else dtype


def _as_stored(pool: Tensor, fmt: Format) -> Tensor:
    """Return the pool as kernels read it: codes as int16."""
    return pool.view(torch.int16) if fmt.has_scale else pool


def _planes(fmt: Format) -> int:
    """Return the codes of one int16, 1 for native storage."""
    return 2 * fmt.codes_per_byte if fmt.has_scale else 1
