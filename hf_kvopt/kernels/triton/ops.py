"""Attention as ops of torch.library under `hf_kvopt::`, which the Triton backend of `kernels.attention` calls.

One rule for all: a CUDA tensor takes the kernel, and so does a CPU tensor under TRITON_INTERPRET=1; every other tensor
takes the reference in torch; what a CUDA device cannot do raises `UnsupportedDevice`. Fake implementations and declared
mutations let `torch.compile(fullgraph=True)` and CUDA graphs see one opaque op each.

Queries are aligned bottom-right: query i of a row sits at position seq_len - q_len + i. The ops have no gradient,
and raise where one would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.errors import KVOptError
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.library import PATTERN, define_op
from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.paged_kv import PagedKV, empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, paged_reference
from hf_kvopt.kernels.triton import cascade as _cascade
from hf_kvopt.kernels.triton import flash_prefill as _flash_prefill
from hf_kvopt.kernels.triton import merge_state as _merge_state
from hf_kvopt.kernels.triton import paged_decode as _paged_decode
from hf_kvopt.kernels.triton import paged_prefill as _paged_prefill

# Flat, in the field order of PagedKV: the ops know tensors and numbers only.
_PAGED = (
    "Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor seq_lens, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? shared"
)
_FLASH_PREFILL = (
    f"(Tensor q, Tensor k, Tensor v, {PATTERN}, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "SymInt? max_q_len=None) -> (Tensor, Tensor)"
)
_MERGE_STATE = (
    "(Tensor partial_out, Tensor partial_lse, Tensor? sinks=None, ScalarType? dtype=None) -> (Tensor, Tensor)"
)
_DECODE = f"({_PAGED}, {PATTERN}, Tensor(a!)? scratch=None) -> (Tensor, Tensor)"
_POOLS, _FIELDS = len(PagedKV._fields), len(Pattern._fields)


def _takes_kernel(*inputs: Tensor) -> bool:
    """`runs_kernel`, and an error where a gradient would be lost without a word."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise KVOptError(
            "hf_kvopt ops have no gradient: got an input that requires one; call under torch.no_grad(), or train with "
            "attn_implementation='sdpa'"
        )
    return runs_kernel(inputs[0])


def paged_decode(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: PagedKV,
    pattern: Pattern,
    *,
    scratch: Tensor | None = None,  # float32, see paged_decode.decode_scratch
    return_lse: bool = False,
) -> AttentionOut:
    """Attention of one or a few queries a row, split over the KV length; lengths stay on the device."""
    out, lse = torch.ops.hf_kvopt.paged_decode(q, *kv, *pattern, scratch)
    return AttentionOut(out, lse if return_lse else None)


def paged_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: PagedKV,
    pattern: Pattern,
    *,
    return_lse: bool = False,
) -> AttentionOut:
    """Attention of a chunk of queries through the block table."""
    out, lse = torch.ops.hf_kvopt.paged_prefill(q, *kv, *pattern)
    return AttentionOut(out, lse if return_lse else None)


def flash_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim], last axis contiguous
    v: Tensor,  # [batch, num_kv_heads, kv_len, v_dim], last axis contiguous
    pattern: Pattern,
    packed: Packed | None = None,  # several sequences in one row; batch is 1
    *,
    return_lse: bool = False,
) -> AttentionOut:
    """Attention over dense keys and values."""
    out, lse = torch.ops.hf_kvopt.flash_prefill(q, k, v, *pattern, *(packed or ()))
    return AttentionOut(out, lse if return_lse else None)


def merge_state(
    partial_out: Tensor,  # [num_splits, batch, q_len, num_heads, v_dim], contiguous
    partial_lse: Tensor,  # [num_splits, batch, num_heads, q_len] float32, without sinks
    sinks: Tensor | None = None,  # [num_heads]
    dtype: torch.dtype | None = None,  # of the output; that of the parts if None
) -> AttentionOut:
    """Merge attention over parts of the keys by their log-sum-exp."""
    return AttentionOut(*torch.ops.hf_kvopt.merge_state(partial_out, partial_lse, sinks, dtype))


# An op leaves out trailing arguments that have their default: `rest` is the pattern, or less, and what follows it.
def _paged_decode_impl(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kv, pattern = PagedKV(*rest[:_POOLS]), Pattern(*rest[_POOLS : _POOLS + _FIELDS])
    if _takes_kernel(q):
        scratch = rest[_POOLS + _FIELDS] if len(rest) > _POOLS + _FIELDS else None
        if scratch is None:
            return _both(_cascade.decode(q, kv, pattern))
        return _both(_paged_decode.paged_decode(q, kv, pattern, scratch=scratch))
    return _both(paged_reference(q, kv, pattern))


def _paged_prefill_impl(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    op = _paged_prefill.paged_prefill if _takes_kernel(q) else paged_reference
    return _both(op(q, PagedKV(*rest[:_POOLS]), Pattern(*rest[_POOLS:])))


def _flash_prefill_impl(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    op = _flash_prefill.flash_prefill if _takes_kernel(q, k, v) else _flash_prefill.flash_prefill_reference
    bounds = rest[_FIELDS:]
    packed = Packed(*bounds) if bounds and bounds[0] is not None else None
    return _both(op(q, k, v, Pattern(*rest[:_FIELDS]), packed))


def _merge_state_impl(
    partial_out: Tensor, partial_lse: Tensor, sinks: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    op = _merge_state.merge_state if _takes_kernel(partial_out) else _merge_state.merge_state_reference
    return _both(op(partial_out, partial_lse, sinks, dtype))


def _both(result: AttentionOut) -> tuple[Tensor, Tensor]:
    assert result.lse is not None  # every op computes it; only the callers above may drop it
    return result.out, result.lse


def _paged_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_results(q, PagedKV(*rest[:_POOLS]).v_dim)


def _flash_prefill_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_results(q, v.shape[3])


def _merge_state_fake(
    partial_out: Tensor, partial_lse: Tensor, sinks: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    return partial_out.new_empty(partial_out.shape[1:], dtype=dtype), partial_lse.new_empty(partial_lse.shape[1:])


define_op("paged_decode", _DECODE, _paged_decode_impl, _paged_fake)
define_op("paged_prefill", f"({_PAGED}, {PATTERN}) -> (Tensor, Tensor)", _paged_prefill_impl, _paged_fake)
define_op("flash_prefill", _FLASH_PREFILL, _flash_prefill_impl, _flash_prefill_fake)
define_op("merge_state", _MERGE_STATE, _merge_state_impl, _merge_state_fake)
