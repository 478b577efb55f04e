"""Which code computes an attention: a Triton kernel over blocks or over dense tensors, or the torch path.

paged, few queries      paged_decode      keys split over programs, lengths on the device
paged, many queries     paged_prefill     through the block table
nothing cached before   flash_prefill     over the states as they came
paged, few queries, CPU                   cpu_jit           through the block table
CPU, or what a kernel does not take       torch path over a view of the pool, or over a gathered copy
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.attention.masking import Masking
from hf_kvopt.attention.mla import LatentKV
from hf_kvopt.kernels import dispatch
from hf_kvopt.kernels.cpu import attend
from hf_kvopt.kernels.cpu_codes import decode_codes
from hf_kvopt.kernels.cpu_jit import attend_blocks, can_attend
from hf_kvopt.kernels.cpu_pieces import attend_pieces, can_attend_pieces
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle

logger = logging.getLogger(__name__)

# Queries times the heads of a KV group that one tile of the split kernel takes at most.
_DECODE_ROWS = 64
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Extras(NamedTuple):
    """What a model adds to plain softmax attention."""

    scale: float
    softcap: float | None
    sinks: Tensor | None  # [num_heads], or [batch, num_heads, q_len, 1]
    dropout: float


def run(query: Tensor, key: Tensor, value: Tensor, masking: Masking, extras: Extras) -> Tensor:
    """Attention, [batch, q_len, num_heads, v_head_dim] contiguous."""
    if isinstance(key, LatentKV) and isinstance(value, LatentKV):
        key, value = key.expand_both()
    if not dispatch.runs_kernel(query):
        return _torch_path(query, key, value, masking, extras)
    obstacle = _obstacle(query, key, value, extras)
    if obstacle is not None:
        _say_once(obstacle)
        return _torch_path(query, key, value, masking, extras)
    query = query if query.stride(-1) == 1 else query.contiguous()
    starts = None
    if masking.starts is not None:
        starts = torch.tensor(masking.starts, dtype=torch.int32, device=query.device)
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        return _over_dense(query, key, value, masking, starts, extras)
    if key.states is not None and value.states is not None:
        return _over_dense(query, key.states, value.states, masking, starts, extras)
    if _needs_centre(key, extras):
        return _over_dense(query, key.view_dense(), value.view_dense(), masking, starts, extras)
    return _over_blocks(query, key, value, masking, starts, extras)


def _over_blocks(
    query: Tensor, key: KVHandle, value: KVHandle, masking: Masking, starts: Tensor | None, extras: Extras
) -> Tensor:
    key.check_valid()
    window, mask = masking.window, masking.mask
    if key.skip or key.lags is not None:
        starts, mask = _by_token(key, starts, mask)
    group = query.shape[1] // key.shape[1]
    op = dispatch.paged_decode if query.shape[2] * group <= _DECODE_ROWS else dispatch.paged_prefill
    kv = PagedKV(key.codes, value.codes, key.block_table, key.seq_lens, key.scale, value.scale)
    pattern = Pattern(extras.scale, masking.is_causal, window, extras.softcap, extras.sinks, starts, mask)
    return op(key.for_codes(query), kv, pattern).out


def _by_token(key: KVHandle, starts: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Starts and mask over the columns that a model was promised, as ones over the tokens that the table holds.

    The table holds whole blocks, so some tokens before the first column, and nothing where a row begins later.
    """
    batch, kv_len = key.shape[0], key.shape[2]
    ahead = torch.full((batch,), key.skip, dtype=torch.int32, device=key.device)
    if key.lags is not None:
        ahead = ahead - key.lags
    starts = (ahead if starts is None else ahead + starts).clamp(min=0)
    if mask is None or mask.shape[-1] == 1:
        return starts, mask
    hidden = False if mask.dtype == torch.bool else float("-inf")
    if key.lags is None:
        return starts, F.pad(mask, (key.skip, 0), value=hidden)
    columns = torch.arange(key.skip + kv_len, device=key.device) - ahead[:, None]
    is_column = ((columns >= 0) & (columns < kv_len))[:, None, None]
    index = columns.clamp(0, kv_len - 1)[:, None, None]
    mask = mask.expand(batch, -1, -1, -1)
    moved = mask.gather(-1, index.expand(-1, *mask.shape[1:3], -1))
    return starts, torch.where(is_column, moved, hidden)


def _over_dense(
    query: Tensor, key: Tensor, value: Tensor, masking: Masking, starts: Tensor | None, extras: Extras
) -> Tensor:
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    pattern = Pattern(
        extras.scale, masking.is_causal, masking.window, extras.softcap, extras.sinks, starts, masking.mask
    )
    return dispatch.flash_prefill(query, key, value, pattern).out


def _torch_path(query: Tensor, key: Tensor, value: Tensor, masking: Masking, extras: Extras) -> Tensor:
    if isinstance(key, KVHandle) and isinstance(value, KVHandle) and not _needs_centre(key, extras):
        if _is_compiled(query, key, value, extras):
            return _over_blocks_compiled(query, key, value, masking, extras)
        if _reads_codes(query, key, value, masking, extras):
            return _over_codes(query, key, value, masking, extras)
        pieces = _pieces(query, key, value, masking, extras)
        if pieces is not None:
            return attend_pieces(query, *pieces, extras.scale)
    return attend(
        query,
        key.view_dense() if isinstance(key, KVHandle) else key,
        value.view_dense() if isinstance(value, KVHandle) else value,
        scale=extras.scale,
        is_causal=masking.is_causal,
        window=masking.window,
        softcap=extras.softcap,
        sinks=extras.sinks,
        starts=masking.starts,
        mask=masking.mask,
        dropout=extras.dropout,
    )


def _needs_centre(key: KVHandle, extras: Extras) -> bool:
    """Whether it matters that all scores of a row are shifted alike: beside a sink, or under a cap."""
    return key.centre is not None and (extras.sinks is not None or extras.softcap is not None)


def _is_compiled(query: Tensor, key: KVHandle, value: KVHandle, extras: Extras) -> bool:
    """Whether the blocks hold what the handles stand for, and the CPU's own kernel takes it."""
    is_stored = key.states is None and value.states is None and not extras.dropout
    return is_stored and can_attend(query, key.codes, value.codes, key.scale, value.scale)


def _over_blocks_compiled(query: Tensor, key: KVHandle, value: KVHandle, masking: Masking, extras: Extras) -> Tensor:
    key.check_valid()
    starts = None if masking.starts is None else torch.tensor(masking.starts, dtype=torch.int32)
    kv = PagedKV(key.codes, value.codes, key.block_table, key.seq_lens, key.scale, value.scale)
    pattern = Pattern(
        extras.scale, masking.is_causal, masking.window, extras.softcap, extras.sinks, starts, masking.mask
    )
    return attend_blocks(key.for_codes(query), kv, pattern, skip=key.skip, lags=key.lags)


def _reads_codes(query: Tensor, key: KVHandle, value: KVHandle, masking: Masking, extras: Extras) -> bool:
    """Whether a decode step over quantized storage needs no dequantized copy."""
    is_quantized = key.scale is not None or value.scale is not None
    is_stored = key.states is None and value.states is None
    is_plain = not extras.dropout and (extras.sinks is None or extras.sinks.dim() == 1)
    is_step = query.shape[2] == 1 and masking.starts is None and not torch.is_grad_enabled()
    return is_quantized and is_stored and is_plain and is_step


def _over_codes(query: Tensor, key: KVHandle, value: KVHandle, masking: Masking, extras: Extras) -> Tensor:
    return decode_codes(
        key.for_codes(query),
        key.view_codes(),
        value.view_codes(),
        (key.format, value.format),
        scale=extras.scale,
        window=masking.window if masking.is_causal else None,
        softcap=extras.softcap,
        sinks=extras.sinks,
        mask=masking.mask,
    )


def _pieces(
    query: Tensor, key: KVHandle, value: KVHandle, masking: Masking, extras: Extras
) -> tuple[list[list[Tensor]], list[list[Tensor]]] | None:
    """Keys and values of each row in the pieces that they lie in, where plain causal attention takes them so."""
    is_plain = (
        masking.is_causal and masking.mask is None and masking.window is None and masking.starts in (None, key.starts)
    )
    if not is_plain or extras.softcap is not None or extras.sinks is not None or extras.dropout:
        return None
    if query.shape[-1] != value.shape[-1] or torch.is_grad_enabled() or not can_attend_pieces(query):
        return None
    key.check_valid()
    keys, values = key.pieces(), value.pieces()
    # A row whose own new tokens are not all there has queries that stand at padding.
    if keys is None or values is None or min(sum(piece.shape[1] for piece in row) for row in keys) < query.shape[2]:
        return None
    return keys, values


def _obstacle(query: Tensor, key: Tensor, value: Tensor, extras: Extras) -> str | None:
    """Why the kernels cannot take this call; None where they can."""
    dims = (query.shape[-1], value.shape[-1])
    if any(dim % 8 or not 32 <= dim <= 256 for dim in dims):
        return f"head sizes {dims} (kernels take multiples of 8 from 32 to 256)"
    if query.dtype not in _KERNEL_DTYPES:
        return f"{query.dtype} (kernels take float16, bfloat16 and float32)"
    if extras.dropout or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return "training (kernels have no gradient)"
    if extras.sinks is not None and extras.sinks.dim() != 1:
        return "sinks that differ by query"
    return None


@cache
def _say_once(obstacle: str) -> None:
    logger.warning("hf_kvopt attention takes PyTorch's SDPA instead of its Triton kernels: got %s", obstacle)
