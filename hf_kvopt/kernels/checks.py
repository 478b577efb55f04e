"""Argument checks shared by the launchers: each message names the argument, what came, and what to do.

Shapes, dtypes and strides are checked always, on the host. Values that live on the device (block numbers,
lengths) are checked under HF_KVOPT_DEBUG=1 only, because reading them stops the stream.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedDevice
from hf_kvopt.kernels.triton.launch import Target
from hf_kvopt.quant import Format, format_of

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def debug_enabled() -> bool:
    """Whether device-side values are to be checked."""
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


def check_format_runs(fmt: Format, target: Target) -> None:
    """Raise UnsupportedDevice if this card cannot read the format; call it when a cache is built."""
    if fmt.min_capability is not None and (0, 0) < target.capability < fmt.min_capability:
        need = ".".join(map(str, fmt.min_capability))
        have = ".".join(map(str, target.capability))
        raise UnsupportedDevice(f"{fmt.name} needs compute capability {need}: got {have}; use int8 instead")
