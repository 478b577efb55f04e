"""Attention of a few queries over blocks on a CPU, in machine code made at first use (kernels/cpu/jit/).

Keys and values are read where they lie, through the block table: rows that share blocks, end at unlike lengths or lie
scattered cost what one contiguous row costs. `can_attend` says whether a call can be taken.
"""

import threading
from array import array
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.calls import AttentionCall, KVView
from hf_kvopt.kernels.cpu.address import PoolAddress
from hf_kvopt.kernels.cpu.jit.spec import BOOL_MASK, CHUNK, FLOAT_MASK, NO_MASK, NO_WINDOW, Spec, part_items
from hf_kvopt.kernels.cpu.program import bits_of, can_compile, compiled, lanes, num_threads
from hf_kvopt.kernels.pattern import LOG2E, Pattern
from hf_kvopt.kernels.shared_blocks import SharedBlocks

# Scaled queries of a KV head's group, which each thread keeps on its stack: chunks of 512 tokens with 4 heads of 64. A
# chunk of 512 queries against 640 tokens takes 0.48x of SDPA's time (2 cores, AVX-512).
MAX_QUERY_BYTES = 1 << 19
# Queries of one task over shared tokens: with their sums, of 128 channels, 128 KiB that stay in the second-level cache.
MAX_SHARED_QUERIES = 128
# Reads of shared tokens below which a second call is not worth its 3 to 8 us (2 cores, AVX-512).
MIN_SAVED_BYTES = 1 << 20
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_MASK, _NO_SINKS = (NO_MASK, 0, 0, 0, 0), (0, 0, 0, 0)
_KEPT_SCRATCH = 1 << 16  # float32 values: what decoding takes
_THREAD = threading.local()
# Products (queries x tokens x channels) below which one thread is done before a second has begun.
SERIAL_WORK = 1 << 18


def accepts(call: AttentionCall) -> bool:
    """Take calls over blocks alone, of queries that a thread can keep."""
    q, k, v, _, dropout = call
    if (
        not isinstance(k, KVView)
        or not isinstance(v, KVView)
        or dropout
        or k.states is not None
        or v.states is not None
    ):
        return False
    if k.plane.address is None or v.plane.address is None or (k.centre is not None and call.needs_centre):
        return False
    return can_attend(q, k.plane.address, v.plane.address)


def run(call: AttentionCall) -> Tensor:
    """Read keys and values where they lie."""
    q, k, v, pattern, _ = call
    assert isinstance(k, KVView)
    assert isinstance(v, KVView)
    q = k.for_codes(q) if k.spec.rotates else q
    shared = call.shared_blocks(MIN_SAVED_BYTES) if q.shape[0] > 1 else None
    return attend_blocks(q, k.plane.address, v.plane.address, *k.row_tensors(), pattern, skip=k.skip, shared=shared)  # type: ignore[arg-type]


def can_attend(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: PoolAddress,
    v: PoolAddress,
) -> bool:
    """Return whether `attend_blocks` takes this call."""
    if torch.compiler.is_compiling() or not can_compile():
        return False
    if type(q) is not Tensor or q.device.type != "cpu" or (q.requires_grad and torch.is_grad_enabled()):
        return False
    batch, num_heads, q_len, head_dim = q.shape
    group_bytes = 4 * num_heads // k.num_heads * q_len * head_dim
    return q.dtype in QUERY_DTYPES and batch > 0 and 0 < group_bytes <= MAX_QUERY_BYTES


def attend_blocks(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: PoolAddress,
    v: PoolAddress,
    block_table: Tensor,  # [batch, max_blocks] int32
    seq_lens: Tensor,  # [batch] int32
    lags: Tensor | None,  # [batch] int32
    pattern: Pattern,
    *,
    skip: int = 0,
    shared: SharedBlocks | None = None,
) -> Tensor:
    """Attention with queries aligned to the end of each row: query i sits at token seq_len - q_len + i.

    The pattern's `starts` and `mask` count columns: row i's token t stands in column t + lags[i] - skip. Its sinks may
    differ by query, [batch | 1, num_heads, q_len | 1, 1]. What rows share is read once for all; no bit of the output
    shows it.

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, in q's dtype; 0 for a query that may see no token.
    """
    batch, num_heads, q_len, head_dim = q.shape
    group = num_heads // k.num_heads
    rows = group * q_len
    together = min(rows, 4)
    scale_bits = max(k.scale_bits, v.scale_bits)
    program, part_size = _program(together, k.dim, v.dim, k.code, v.code, scale_bits, lanes())
    states = q if q.dtype == torch.float32 and q.stride(3) == 1 else q.float().contiguous()
    capacity = block_table.shape[1] << k.block_shift
    splits = -(-capacity // CHUNK)
    num_tasks = batch * k.num_heads * splits
    out = states.new_empty((batch, q_len, num_heads, v.dim))
    padded = -(-rows // together) * together
    parts = scratch(num_tasks * padded * part_size)
    work = batch * num_heads * q_len * capacity * (head_dim + v.dim)
    first, behind, held = pattern_arguments(pattern)
    # In the order of spec.ARGUMENTS.
    arguments = array("q", (
        0, num_tasks, num_threads() if work > SERIAL_WORK else 1, splits, k.num_heads, group, q_len, padded,
        states.data_ptr(), *states.stride()[:3],
        *k.arguments, *v.arguments,
        block_table.data_ptr(), block_table.stride(0), k.block_shift, seq_lens.data_ptr(),
        first, 0 if lags is None else lags.data_ptr(), skip,
        *((0, 1) if shared is None else (shared.tokens.data_ptr(), batch // len(shared.tokens))), *behind,
        out.data_ptr(), parts.data_ptr(),
    ))  # fmt: skip
    if shared is not None:
        _attend_shared(shared, batch, rows, (k.dim, v.dim, k.code, v.code, scale_bits, lanes()), arguments)
    program.run(arguments.buffer_info()[0])
    del held
    return out if q.dtype == torch.float32 else out.to(q.dtype)


def _attend_shared(
    shared: SharedBlocks,
    batch: int,
    num_queries: int,  # of a row and KV head
    fields: tuple[Any, ...],  # of the spec
    arguments: "array[int]",  # of what each row does alone
) -> None:
    """Begin the parts of all rows with the tokens that they share."""
    runs, (_, _, num_threads, _, num_kv_heads) = len(shared.tokens), arguments[:5]
    splits, run = -(-shared.most // CHUNK), batch // runs
    # As many rows as a thread can keep, but no thread without a task.
    pieces = max(1, -(-num_threads // (runs * num_kv_heads * splits)), -(-run * num_queries // MAX_SHARED_QUERIES))
    piece = -(-run // pieces)
    num_tasks = runs * -(-run // piece) * num_kv_heads * splits
    own = arguments[:]
    own[1] = num_tasks
    own.extend((piece, splits))
    _shared_program(min(piece * num_queries, 4), *fields).run(own.buffer_info()[0])


def pattern_arguments(pattern: Pattern) -> tuple[int, tuple[int, ...], tuple[Tensor | None, ...]]:
    """Return what a kernel is told of a pattern: the address of `starts` or 0, the arguments from "is_causal" to the
    sinks, and the tensors that lie at these addresses, to be held until the kernel has run."""
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    if mask is not None:
        mask = _as_read(mask)
    if sinks is not None:
        sinks = (sinks[None, :, None, None] if sinks.dim() == 1 else sinks).float()
    first = None if starts is None else torch.as_tensor(starts, dtype=torch.int32, device="cpu")
    behind = (
        int(is_causal), NO_WINDOW if window is None else window,
        bits_of(scale * LOG2E if softcap is None else scale / softcap), bits_of((softcap or 0.0) * LOG2E),
        *(_NO_MASK if mask is None else _mask_arguments(mask)),
        *(_NO_SINKS if sinks is None else (sinks.data_ptr(), *_broadcast_strides(sinks, 1))),
    )  # fmt: skip
    return 0 if first is None else first.data_ptr(), behind, (mask, sinks, first)


def _as_read(mask: Tensor) -> Tensor:
    """A mask as bool or float32 with adjacent columns."""
    if mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))
    return mask if mask.stride(3) == 1 else mask.contiguous()


def _mask_arguments(mask: Tensor) -> tuple[int, ...]:
    kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    return kind, mask.data_ptr(), *_broadcast_strides(mask, mask.element_size())


def _broadcast_strides(x: Tensor, item: int) -> tuple[int, ...]:
    """Strides of the first three axes, 0 along each that has one entry for all."""
    return tuple(0 if size == 1 else stride * item for size, stride in zip(x.shape[:3], x.stride(), strict=False))


def scratch(size: int) -> Tensor:
    """At least `size` float32 values that this thread's next kernel may write; a few are kept from call to call."""
    if size > _KEPT_SCRATCH:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    kept: Tensor | None = getattr(_THREAD, "scratch", None)
    if kept is None:
        kept = _THREAD.scratch = torch.empty(_KEPT_SCRATCH, dtype=torch.float32, device="cpu")
    return kept


@cache
def _shared_program(*fields: Any) -> Any:
    return compiled("shared", Spec(*fields)._replace(is_shared=True))


@cache
def _program(*fields: Any) -> tuple[Any, int]:
    """The kernel of the spec with these fields, and the float32 values of scratch that a task takes for a row."""
    spec = Spec(*fields)
    return compiled("attention", spec), part_items(spec)
