"""Argument checks shared by the launchers: each message names the argument, what came, and what to do.

Shapes, dtypes and strides are checked always, on the host. Values that live on the device (block numbers,
lengths) are checked under HF_KVOPT_DEBUG=1 only, because reading them stops the stream.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from hf_kvopt.kernels.devices import check_format_runs
from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.triton.launch import Target
from hf_kvopt.quant import Format, format_of

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def debug_enabled() -> bool:
    """Return whether device-side values are to be checked; the environment is read once."""
    return os.environ.get("HF_KVOPT_DEBUG", "0") == "1"


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless every axis has the expected length; None is any."""
    fits = tensor.ndim == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        raise ValueError(f"{name} must have shape [{wanted}]: got {list(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the dtype is one of the allowed."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {wanted}: got {str(tensor.dtype).removeprefix('torch.')}; convert it first")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ValueError unless the tensor lives where q lives."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}: got {tensor.device}; move it there once, not per call")


def check_last_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last axis has stride 1."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a contiguous last axis: got strides {tensor.stride()}; pass {name}.contiguous()"
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous: got shape {list(tensor.shape)} with strides {tensor.stride()}; "
            "allocate the pool in one piece"
        )


def check_head_dim(name: str, dim: int) -> None:
    """Raise ValueError unless the kernels can pad this head size."""
    if dim % 8 or not 32 <= dim <= 256:
        raise ValueError(f"{name} must be a multiple of 8 from 32 to 256: got {dim}; use attn_implementation='sdpa'")


def check_pool(
    name: str,  # "k" or "v"
    pool: Tensor,  # [num_blocks, block_size, num_kv_heads, packed dim]
    scale: Tensor | None,  # [num_blocks, block_size, num_kv_heads, *scale_shape]
    target: Target,
) -> Format:
    """Return the pool's format after checking the pool, its scales and that the device can read it."""
    check_shape(f"{name}_pool", pool, (None, None, None, None))
    check_contiguous(f"{name}_pool", pool)
    block_size = pool.shape[1]
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16: got {block_size}")
    fmt = format_of(pool.dtype)
    check_head_dim(f"{name}_pool's head_dim", pool.shape[-1] * fmt.codes_per_byte)
    if fmt.has_scale != (scale is not None):
        need = "needs" if fmt.has_scale else "takes no"
        raise ValueError(f"{name}_scale: {fmt.name} storage {need} scale: got {None if scale is None else 'one'}")
    if scale is not None:
        check_shape(f"{name}_scale", scale, (*pool.shape[:3], *fmt.scale_shape))
        check_dtype(f"{name}_scale", scale, torch.float16, torch.float32)
        check_contiguous(f"{name}_scale", scale)
        check_device(f"{name}_scale", scale, pool)
    check_format_runs(fmt, target)
    return fmt


def check_pattern(pattern: Pattern, q: Tensor) -> None:
    """Raise unless the pattern suits q [batch, num_heads, q_len, head_dim]."""
    scale, _, window, softcap, sinks, starts, mask = pattern
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite and not zero: got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1: got {window}; pass None for no window")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite: got {softcap}; pass None for no cap")
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[1],))
        check_dtype("sinks", sinks, *COMPUTE_DTYPES)
        check_last_contiguous("sinks", sinks)
        check_device("sinks", sinks, q)
    if starts is not None:
        if not isinstance(starts, Tensor):
            raise TypeError(f"starts must be an int32 tensor: got {type(starts).__name__}; pass torch.tensor(starts)")
        check_shape("starts", starts, (q.shape[0],))
        check_dtype("starts", starts, torch.int32)
        check_device("starts", starts, q)
    if mask is not None:
        _check_mask(mask, *q.shape[:3])
        check_device("mask", mask, q)


def _check_mask(mask: Tensor, batch: int, num_heads: int, q_len: int) -> None:
    """Raise unless the mask broadcasts to [batch, num_heads, q_len, kv_len] and is bool or float."""
    check_dtype("mask", mask, torch.bool, *COMPUTE_DTYPES)
    full = (batch, num_heads, q_len)
    if mask.ndim != 4 or any(have not in (1, want) for have, want in zip(mask.shape[:3], full, strict=True)):
        raise ValueError(
            f"mask must have shape [{batch} or 1, {num_heads} or 1, {q_len} or 1, kv_len]: got {list(mask.shape)}; "
            "expand a 2D padding mask or pass starts"
        )


def check_paged(q: Tensor, kv: PagedKV, pattern: Pattern, target: Target) -> None:
    """Check every argument of a paged attention op."""
    k_pool, v_pool, block_table, seq_lens, k_scale, v_scale, shared = kv
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    check_last_contiguous("q", q)
    batch, num_heads, _, head_dim = q.shape
    k_format = check_pool("k", k_pool, k_scale, target)
    v_format = check_pool("v", v_pool, v_scale, target)
    check_shape("k_pool", k_pool, (None, None, None, head_dim // k_format.codes_per_byte))
    check_shape("v_pool", v_pool, (*k_pool.shape[:3], None))
    for name, pool, fmt in (("k_pool", k_pool, k_format), ("v_pool", v_pool, v_format)):
        if not fmt.has_scale:
            check_dtype(name, pool, q.dtype)
    if num_heads % k_pool.shape[2]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {k_pool.shape[2]}: got {num_heads}")
    check_shape("block_table", block_table, (batch, None))
    check_dtype("block_table", block_table, torch.int32)
    check_last_contiguous("block_table", block_table)
    check_shape("seq_lens", seq_lens, (batch,))
    check_dtype("seq_lens", seq_lens, torch.int32)
    if shared is not None:
        _check_shared(shared, batch)
        check_device("shared", shared, q)
    check_pattern(pattern, q)
    for name, tensor in (("k_pool", k_pool), ("v_pool", v_pool), ("block_table", block_table), ("seq_lens", seq_lens)):
        check_device(name, tensor, q)
    if debug_enabled():
        check_table_values(block_table, seq_lens, k_pool.shape[0], k_pool.shape[1])


def _check_shared(shared: Tensor, batch: int) -> None:
    """Raise unless the batch is as many rows for each entry."""
    check_shape("shared", shared, (None,))
    check_dtype("shared", shared, torch.int32)
    check_contiguous("shared", shared)
    if not len(shared) or batch % len(shared):
        raise ValueError(f"shared must have one entry for each run of a batch of {batch} rows: got {len(shared)}")


def check_table_values(block_table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> None:
    """Raise ValueError if a length exceeds the table or a used entry points outside of the pool (stops the stream)."""
    capacity = block_table.shape[1] * block_size
    longest, shortest = int(seq_lens.max()), int(seq_lens.min())
    if longest > capacity or shortest < 0:
        raise ValueError(
            f"seq_lens must lie between 0 and the table's capacity {capacity}: got {shortest} to {longest}; "
            "reserve blocks before attending"
        )
    used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < seq_lens[:, None]
    # -1 is allowed: a sliding layer has freed what lies behind its window.
    wrong = used & ((block_table >= num_blocks) | (block_table < -1))
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"block_table must point into the pool of {num_blocks} blocks: got {int(block_table[row, column])} "
            f"at row {row}, column {column}; the table belongs to another pool or was not filled"
        )


def check_dense(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: Packed | None) -> None:
    """Check every argument of attention over dense keys and values."""
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    batch, num_heads, _, head_dim = q.shape
    check_shape("k", k, (batch, None, None, head_dim))
    check_shape("v", v, (*k.shape[:3], None))
    check_head_dim("head_dim", head_dim)
    check_head_dim("v's head_dim", v.shape[3])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(name, tensor)
        check_dtype(name, tensor, q.dtype)
        check_device(name, tensor, q)
    if num_heads % max(1, k.shape[1]):
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {k.shape[1]}: got {num_heads}")
    check_pattern(pattern, q)
    if packed is not None:
        _check_packed(q, k, v, pattern, packed)


def _check_packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: Packed) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1: got {q.shape[0]}; concatenate them along q_len")
    if pattern.starts is not None or pattern.mask is not None:
        raise ValueError("packed sequences take neither starts nor mask: got one; drop the padding instead")
    for name, tensor in (("k", k), ("v", v)):
        # Where a sequence begins is computed in 32 bits.
        if tensor.shape[2] * tensor.stride(2) >= 2**31:
            raise ValueError(
                f"packed {name} must span fewer than 2**31 elements: got {tensor.shape[2]} tokens of stride "
                f"{tensor.stride(2)}; pack fewer sequences into one call"
            )
    for name, bounds, length in (
        ("cu_seqlens_q", packed.cu_seqlens_q, q.shape[2]),
        ("cu_seqlens_k", packed.cu_seqlens_k, k.shape[2]),
    ):
        check_shape(name, bounds, (packed.num_seqs + 1,))
        check_dtype(name, bounds, torch.int32)
        check_contiguous(name, bounds)
        check_device(name, bounds, q)
        if debug_enabled():
            steps = bounds.diff()
            if int(bounds[0]) != 0 or int(bounds[-1]) > length or bool((steps < 0).any()):
                raise ValueError(f"{name} must rise from 0 to at most {length}: got {bounds.tolist()}")
