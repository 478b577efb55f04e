"""Attention by the Triton kernels: which one takes a call, and why none does.

paged, few queries         paged_decode      keys split over programs, lengths on the device
paged, many queries        paged_prefill     through the block table
nothing cached before      flash_prefill     over the states as they came
sealed blocks              sealed_attention  few and many queries, both forms in one pass
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.kernels.calls import AttentionCall, KVView
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import BothForms, SealedKV
from hf_kvopt.kernels.sealed_view import FEW_BLOCKS, SealedView, depths
from hf_kvopt.kernels.triton import cascade, ops
from hf_kvopt.kernels.triton.paged_decode import paged_decode
from hf_kvopt.kernels.triton.sealed_attention import sealed_attention

logger = logging.getLogger(__name__)

# Reads of shared tokens below which a launch of its own, some 10 us, is not worth it: what an H200 takes from its
# second-level cache in about as long.
_MIN_SAVED_BYTES = 1 << 25
# Queries times the heads of a KV group that one tile of the split kernel takes at most.
_DECODE_ROWS = 64
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def accepts(call: AttentionCall) -> bool:
    """Take calls on a device that runs the kernels; where one is passed on there, that is said once."""
    if not runs_kernel(call.q) or (isinstance(call.k, KVView) and call.k.plane.sealed is not None):
        return False
    obstacle = _obstacle(call)
    if obstacle is not None:
        _say_once(obstacle)
    return obstacle is None


def run(call: AttentionCall) -> Tensor:
    """Call the op that suits."""
    q, k, v, pattern, _ = call
    q = q if q.stride(-1) == 1 else q.contiguous()
    # While it is known here where rows start. Sealed blocks are read row by row.
    is_shared = q.shape[0] > 1 and not isinstance(k, SealedView)
    shared = call.shared_blocks(_MIN_SAVED_BYTES) if is_shared else None
    if pattern.starts is not None:
        pattern = pattern._replace(starts=_on_device(pattern.starts, k, q.device))
    if not isinstance(k, KVView) or not isinstance(v, KVView):
        return _over_dense(q, _dense(k), _dense(v), pattern)
    if k.states is not None and v.states is not None:
        return _over_dense(q, k.states, v.states, pattern)
    if call.needs_centre:
        return _over_dense(q, k.dense(), v.dense(), pattern)
    if isinstance(k, SealedView) and isinstance(v, SealedView):
        return _over_sealed(q, k, v, pattern)
    return _over_blocks(q, k, v, pattern, None if shared is None else shared.tokens)


def _on_device(starts: Tensor | Sequence[int], k: Tensor | KVView, device: torch.device) -> Tensor:
    """Return starts as a kernel takes them; those of a cache's rows are copied once a step, and not at each layer."""
    if isinstance(k, KVView) and not isinstance(starts, Tensor):
        return k.rows.numbers(starts, device)
    return torch.as_tensor(starts, dtype=torch.int32, device=device)


def _over_blocks(q: Tensor, k: KVView, v: KVView, pattern: Pattern, shared: Tensor | None) -> Tensor:
    block_table, seq_lens, lags = k.row_tensors()
    if k.skip or lags is not None:
        pattern = _by_token(k, lags, pattern)
    kv = PagedKV(k.plane.codes, v.plane.codes, block_table, seq_lens, k.plane.scale, v.plane.scale, shared)
    group = q.shape[1] // k.spec.shape[1]
    if q.shape[2] * group > _DECODE_ROWS:
        return ops.paged_prefill(k.for_codes(q), kv, pattern).out
    # An op is for graphs; outside of them a decode step would pay for its way through the dispatcher.
    kernel = paged_decode if shared is None else cascade.decode
    op = ops.paged_decode if torch.compiler.is_compiling() else kernel
    return op(k.for_codes(q), kv, pattern).out


def _over_sealed(q: Tensor, k: SealedView, v: SealedView, pattern: Pattern) -> Tensor:
    block_table, seq_lens, lags = k.row_tensors()
    q_len, table, size = q.shape[2], k.table, k.table.block_size
    nodes = depths(pattern, q_len)  # before columns of the mask become tokens
    if not pattern.is_causal and q_len > 1 and (pattern.mask is None or pattern.mask.shape[2] == 1):
        # Nothing says in which order the queries stand: all read as the last one does.
        nodes = torch.full((q_len,), q_len - 1, dtype=torch.int32, device=q.device)
    if k.skip or lags is not None:
        pattern = _by_token(k, lags, pattern)
    is_few = q_len * (q.shape[1] // k.spec.shape[1]) <= _DECODE_ROWS and q_len <= FEW_BLOCKS * size
    k_forms, v_forms = _both_forms(k, with_new=not is_few), _both_forms(v, with_new=not is_few)
    kv = SealedKV(k_forms, v_forms, block_table, table.exact_table(q.device), seq_lens, table.first_block, nodes)
    return sealed_attention(q, kv, pattern, few=is_few).out


def _both_forms(x: SealedView, with_new: bool) -> BothForms:
    """Return the storage of a view and, of a long step, the states that lie nowhere else."""
    new = x.arrived if with_new else None
    return x.storage.both_forms(new if new is None or new.stride(-1) == 1 else new.contiguous())


def _by_token(k: KVView, lags: Tensor | None, pattern: Pattern) -> Pattern:
    """Return the pattern over the tokens that rows hold, and not over the columns that a model was promised.

    Rows hold whole blocks, so some tokens before the first column, and nothing where a row begins later.
    """
    starts, mask = pattern.starts, pattern.mask
    assert starts is None or isinstance(starts, Tensor)
    batch, _, kv_len, _ = k.spec.shape
    device = k.plane.codes.device
    ahead = torch.full((batch,), k.skip, dtype=torch.int32, device=device)
    if lags is not None:
        ahead = ahead - lags
    starts = (ahead if starts is None else ahead + starts).clamp(min=0)
    if mask is None or mask.shape[-1] == 1:
        return pattern._replace(starts=starts)
    hidden = False if mask.dtype == torch.bool else float("-inf")
    if lags is None:
        return pattern._replace(starts=starts, mask=F.pad(mask, (k.skip, 0), value=hidden))
    columns = torch.arange(k.skip + kv_len, device=device) - ahead[:, None]
    is_column = ((columns >= 0) & (columns < kv_len))[:, None, None]
    index = columns.clamp(0, kv_len - 1)[:, None, None]
    mask = mask.expand(batch, -1, -1, -1)
    moved = mask.gather(-1, index.expand(-1, *mask.shape[1:3], -1))
    return pattern._replace(starts=starts, mask=torch.where(is_column, moved, hidden))


def _over_dense(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return ops.flash_prefill(q, k, v, pattern).out


def _dense(x: Tensor | KVView) -> Tensor:
    return x.dense() if isinstance(x, KVView) else x


def _obstacle(call: AttentionCall) -> str | None:
    """Say why the kernels cannot take this call; None where they can."""
    q, k, v, pattern, dropout = call
    v_dim = v.spec.shape[-1] if isinstance(v, KVView) else v.shape[-1]
    if not _takes_dims(q.shape[-1], v_dim):
        return f"head sizes {q.shape[-1], v_dim} (kernels take multiples of 8 from 32 to 256)"
    if q.dtype not in _KERNEL_DTYPES:
        return f"{q.dtype} (kernels take float16, bfloat16 and float32)"
    if dropout or (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))):
        return "training (kernels have no gradient)"
    if pattern.sinks is not None and pattern.sinks.dim() != 1:
        return "sinks that differ by query"
    if isinstance(k, SealedView) and isinstance(v, SealedView):
        return _sealed_obstacle(k, v)
    return None


@cache
def _takes_dims(*dims: int) -> bool:
    return all(dim % 8 == 0 and 32 <= dim <= 256 for dim in dims)


def _sealed_obstacle(k: SealedView, v: SealedView) -> str | None:
    """Say why the kernel cannot read sealed blocks; None where it can."""
    size = k.table.block_size
    if size < 16 or size & (size - 1):
        return f"blocks of {size} tokens (the kernel takes powers of two from 16 on)"
    if k.storage.codec.num_groups(k.spec.shape[3]) != 1:
        return "sealed keys of several groups of channels"
    if v.storage.codec.centred:
        return "sealed values whose mean is taken out"
    return None


@cache
def _say_once(obstacle: str) -> None:
    logger.warning("hf_kvopt attention takes PyTorch's SDPA instead of its Triton kernels: got %s", obstacle)
