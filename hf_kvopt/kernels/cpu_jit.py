"""Attention of a few queries over blocks on a CPU, in machine code made at first use (kernels/jit/).

Keys and values are read where they lie, through the block table: rows that share blocks, end at unlike lengths or lie
scattered cost what one contiguous row costs. The work is shared out over the threads that torch computes with, which
are those of torch's own OpenMP team and not a second one beside it.

Needs llvmlite and a processor with AVX2 or AVX-512. `can_attend` says whether a call can be taken; kernels/cpu.py takes
the others.
"""

import ctypes
import importlib
import importlib.util
import logging
import os
import struct
import time
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.jit.spec import BOOL_MASK, CHUNK, FLOAT_MASK, NO_MASK, Spec, part_items
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import LOG2E, Pattern

logger = logging.getLogger(__name__)

# Scaled queries of a KV head's group, which each thread keeps on its stack: chunks of 512 tokens with 4 heads of 64. A
# chunk of 512 queries against 640 tokens takes 0.48x of SDPA's time (2 cores, AVX-512).
_MAX_QUERY_BYTES = 1 << 19
_MAX_DIM = 256
_MIN_BLOCK = 16  # a unit of keys lies in one block
_QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
_NO_WINDOW = 1 << 40
# Products (queries x tokens x channels) below which one thread is done before a second has begun.
_SERIAL_WORK = 1 << 18
# In a child of a fork the team's threads are missing, and whoever waits for them waits for ever.
_PROCESS = os.getpid()


def can_attend(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: Tensor,  # [num_blocks, block_size, num_kv_heads, width]
    v: Tensor,  # [num_blocks, block_size, num_kv_heads, v_width]
    k_scale: Tensor | None,  # [num_blocks, block_size, num_kv_heads, *scale_shape]
    v_scale: Tensor | None,
) -> bool:
    """Whether `attend_blocks` takes this call."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not _can_compile():
        return False
    if type(q) is not Tensor or type(k) is not Tensor or (q.requires_grad and torch.is_grad_enabled()):
        return False
    block_size, num_kv_heads = k.shape[1], k.shape[2]
    return (
        0 < 4 * q.numel() // (q.shape[0] * num_kv_heads or 1) <= _MAX_QUERY_BYTES
        and q.dtype in _QUERY_DTYPES
        and block_size >= _MIN_BLOCK
        and not block_size & (block_size - 1)
        and _is_readable(k, k_scale)
        and _is_readable(v, v_scale)
    )


def _is_readable(codes: Tensor, scale: Tensor | None) -> bool:
    """Whether a token's channels, and the scales of a block's tokens, lie beside one another."""
    if codes.dtype not in _CODES or codes.shape[3] > _MAX_DIM or codes.stride(3) != 1:
        return False
    if scale is None:
        return True
    is_packed = scale.stride(1) == 1 if scale.dim() == 3 else scale.stride()[1::2] == (scale.shape[3], 1)
    return is_packed and scale.dtype in (torch.float16, torch.float32)


def attend_blocks(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    kv: PagedKV,
    pattern: Pattern,
    *,
    skip: int = 0,
    lags: Tensor | None = None,  # [batch] int32
) -> Tensor:
    """Attention with queries aligned to the end of each row: query i sits at token seq_len - q_len + i.

    The pattern's `starts` and `mask` count columns: row i's token t stands in column t + lags[i] - skip. Its sinks may
    differ by query, [batch | 1, num_heads, q_len | 1, 1].

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, in q's dtype; 0 for a query that may see no token.
    """
    k, v, block_table, seq_lens, k_scale, v_scale = kv
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    batch, num_heads, q_len, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    rows, v_dim = group * q_len, kv.v_dim
    scale_bits = 32 if torch.float32 in (getattr(k_scale, "dtype", None), getattr(v_scale, "dtype", None)) else 16
    spec = Spec(min(rows, 4), head_dim, v_dim, _CODES[k.dtype], _CODES[v.dtype], scale_bits, _machine().lanes_here())
    states = q if q.dtype == torch.float32 and q.stride(3) == 1 else q.float().contiguous()
    splits = -(-block_table.shape[1] * block_size // CHUNK)
    num_tasks = batch * num_kv_heads * splits
    padded = -(-rows // spec.rows) * spec.rows
    out = torch.empty(batch, q_len, num_heads, v_dim)
    parts = torch.empty(num_tasks * padded * part_items(spec))
    work = batch * num_heads * q_len * block_table.shape[1] * block_size * (head_dim + v_dim)
    mask_kind, mask = _as_read(mask)
    if sinks is not None:
        sinks = (sinks[None, :, None, None] if sinks.dim() == 1 else sinks).float()
    first = None if starts is None else torch.as_tensor(starts, dtype=torch.int32)
    # In the order of spec.ARGUMENTS.
    arguments = array("q", (
        0, num_tasks, _num_threads() if work > _SERIAL_WORK else 1, splits, num_kv_heads, group, q_len,
        states.data_ptr(), *states.stride()[:3],
        *_plane(k, k_scale), *_plane(v, v_scale),
        block_table.data_ptr(), block_table.stride(0), block_size.bit_length() - 1, seq_lens.data_ptr(),
        _address(first), _address(lags), skip,
        is_causal, _NO_WINDOW if window is None else window,
        _bits(scale * LOG2E if softcap is None else scale / softcap), _bits((softcap or 0.0) * LOG2E),
        mask_kind, _address(mask), *_broadcast_strides(mask, 1 if mask_kind == BOOL_MASK else 4),
        _address(sinks), *_broadcast_strides(sinks, 1),
        out.data_ptr(), parts.data_ptr(),
    ))  # fmt: skip
    _program(spec).run(arguments.buffer_info()[0])
    return out if q.dtype == torch.float32 else out.to(q.dtype)


def _plane(codes: Tensor, scale: Tensor | None) -> tuple[int, ...]:
    """Address and strides in bytes: of blocks, tokens and heads, and of the scales' blocks and heads."""
    item = codes.element_size()
    block, token, head, _ = codes.stride()
    if scale is None:
        return codes.data_ptr(), block * item, token * item, head * item, 0, 0, 0
    scale_item = scale.element_size()
    strides = scale.stride(0) * scale_item, scale.stride(2) * scale_item
    return codes.data_ptr(), block * item, token * item, head * item, scale.data_ptr(), *strides


def _as_read(mask: Tensor | None) -> tuple[int, Tensor | None]:
    """A mask as bool or float32 with adjacent columns."""
    if mask is None:
        return NO_MASK, None
    if mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))
    return BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK, mask if mask.stride(3) == 1 else mask.contiguous()


def _broadcast_strides(x: Tensor | None, item: int) -> tuple[int, ...]:
    """Strides of the first three axes, 0 along each that has one entry for all."""
    if x is None:
        return 0, 0, 0
    return tuple(0 if size == 1 else stride * item for size, stride in zip(x.shape[:3], x.stride(), strict=False))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("=d", value), "little", signed=True)


def _num_threads() -> int:
    return torch.get_num_threads() if _fork_address() is not None and os.getpid() == _PROCESS else 1


@cache
def _can_compile() -> bool:
    if importlib.util.find_spec("llvmlite") is None:
        logger.info("llvmlite is not installed: attention on the CPU takes torch's operations instead of one kernel")
        return False
    return _machine().lanes_here() is not None


@cache
def _machine() -> Any:
    # Not at the top: it costs some 0.1 s, and a GPU has no need of it.
    return importlib.import_module("hf_kvopt.kernels.jit.machine")


@cache
def _program(spec: Spec) -> Any:
    start = time.perf_counter()
    program = _machine().Program(spec, _fork_address())
    logger.debug("compiled attention for %s in %.2f s", spec, time.perf_counter() - start)
    return program


@cache
def _fork_address() -> int | None:
    """GOMP_parallel of the OpenMP library that torch is linked with; None where it is of another kind."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
