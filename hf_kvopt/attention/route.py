"""Which code computes an attention: a Triton kernel over blocks or over dense tensors, or the torch path.

paged, few queries      paged_decode      keys split over programs, lengths on the device
paged, many queries     paged_prefill     through the block table
nothing cached before   flash_prefill     over the states as they came
paged, few queries, CPU                   cpu/paged_attentionthrough the block table
CPU, or what a kernel does not take       torch path over a view of the pool, or over a gathered copy
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.attention.mla import LatentKV
from hf_kvopt.attention.sealed import attend_sealed
from hf_kvopt.kernels import ops as dispatch
from hf_kvopt.kernels.cpu.codes import decode_codes
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.cpu.paged_attention import attend_blocks, can_attend
from hf_kvopt.kernels.cpu.pieces import attend_pieces, can_attend_pieces
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle, handle_on
from hf_kvopt.pool.sealed_handle import SealedHandle

logger = logging.getLogger(__name__)

# Queries times the heads of a KV group that one tile of the split kernel takes at most.
_DECODE_ROWS = 64
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def run(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> Tensor:
    """Attention, [batch, q_len, num_heads, v_head_dim] contiguous; sinks may be [batch, num_heads, q_len, 1] too."""
    if isinstance(key, LatentKV) and isinstance(value, LatentKV):
        key, value = key.expand_both()
    if isinstance(key, SealedHandle) and isinstance(value, SealedHandle):
        return attend_sealed(query, key, value, pattern, dropout)
    if not dispatch.runs_kernel(query):
        return _torch_path(query, key, value, pattern, dropout)
    obstacle = _obstacle(query, key, value, pattern, dropout)
    if obstacle is not None:
        _say_once(obstacle)
        return _torch_path(query, key, value, pattern, dropout)
    query = query if query.stride(-1) == 1 else query.contiguous()
    starts = None
    if pattern.starts is not None:
        starts = torch.as_tensor(pattern.starts, dtype=torch.int32, device=query.device)
        pattern = pattern._replace(starts=starts)
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        return _over_dense(query, key, value, pattern)
    if key.states is not None and value.states is not None:
        return _over_dense(query, key.states, value.states, pattern)
    if _needs_centre(key, pattern):
        return _over_dense(query, key.view_dense(), value.view_dense(), pattern)
    return _over_blocks(query, key, value, pattern, starts)


def _blocks(key: KVHandle, value: KVHandle) -> PagedKV:
    block_table, seq_lens, _ = key.rows()
    return PagedKV(key.codes, value.codes, block_table, seq_lens, key.scale, value.scale)


def _over_blocks(query: Tensor, key: KVHandle, value: KVHandle, pattern: Pattern, starts: Tensor | None) -> Tensor:
    key.check_valid()
    if key.skip or key.lags is not None:
        starts, mask = _by_token(key, starts, pattern.mask)
        pattern = pattern._replace(starts=starts, mask=mask)
    group = query.shape[1] // key.shape[1]
    op = dispatch.paged_decode if query.shape[2] * group <= _DECODE_ROWS else dispatch.paged_prefill
    return op(key.for_codes(query), _blocks(key, value), pattern).out


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


def _over_dense(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    return dispatch.flash_prefill(query, key, value, pattern).out


def _torch_path(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> Tensor:
    if isinstance(key, KVHandle) and isinstance(value, KVHandle) and not dropout:
        # A graph has no addresses; asked first, because it costs a decode step nothing.
        if key.place is None and torch.compiler.is_compiling() and not _wants_gradient(query):
            return _as_one_op(query, key, value, pattern)
        if not _needs_centre(key, pattern):
            out = _over_storage(query, key, value, pattern)
            if out is not None:
                return out
    key = key.view_dense() if isinstance(key, KVHandle) else key
    value = value.view_dense() if isinstance(value, KVHandle) else value
    return attend(query, key, value, pattern, dropout)


def _wants_gradient(query: Tensor) -> bool:
    return torch.is_grad_enabled() and query.requires_grad


def _as_one_op(query: Tensor, key: KVHandle, value: KVHandle, pattern: Pattern) -> Tensor:
    """`_torch_path` over rows of fixed capacity in a compiled graph: the very code that runs outside of one."""
    assert key._block_table is not None
    assert key._seq_lens is not None
    out: Tensor = torch.ops.hf_kvopt.attend_fixed(
        query, key.codes, key.scale, value.codes, value.scale, key._block_table, key._seq_lens, key.centre,
        key.shape[2], key.dtype, value.dtype, key.spec.rotates, *pattern,
    )  # fmt: skip
    return out


def _attend_fixed(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    centre: Tensor | None,
    kv_len: int,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    rotates: bool,
    *pattern: Any,
) -> Tensor:
    """`_torch_path` over handles made of what they hold."""
    # On a CPU it costs nothing to look; elsewhere whoever made the handle left out what is not needed.
    if centre is not None and centre.device.type == "cpu" and not bool(centre.any()):
        centre = None
    key = handle_on(key_codes, key_scale, block_table, seq_lens, kv_len, key_dtype, rotates, centre)
    value = handle_on(value_codes, value_scale, block_table, seq_lens, kv_len, value_dtype)
    return _torch_path(query, key, value, Pattern(*pattern), 0.0)


def _attend_fixed_fake(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    *_: Any,
) -> Tensor:
    batch, num_heads, q_len = query.shape[:3]
    return query.new_empty(batch, q_len, num_heads, PagedKV(key_codes, value_codes, block_table, seq_lens).v_dim)


def _needs_centre(key: KVHandle, pattern: Pattern) -> bool:
    """Whether it matters that all scores of a row are shifted alike: beside a sink, or under a cap."""
    return key.centre is not None and (pattern.sinks is not None or pattern.softcap is not None)


def _over_storage(query: Tensor, key: KVHandle, value: KVHandle, pattern: Pattern) -> Tensor | None:
    """Attention on a CPU over what is stored, as it lies; None where dense keys and values are needed."""
    if key.states is None and value.states is None:
        if key.place is not None and value.place is not None and can_attend(query, key.place, value.place):
            key.check_valid()
            query = key.for_codes(query) if key.spec.rotates else query
            return attend_blocks(query, key.place, value.place, *key.rows(), pattern, skip=key.skip)
        if _reads_codes(query, key, value, pattern):
            formats = key.format, value.format
            return decode_codes(key.for_codes(query), key.view_codes(), value.view_codes(), formats, pattern)
    pieces = _pieces(query, key, value, pattern)
    return None if pieces is None else attend_pieces(query, *pieces, pattern.scale)


def _reads_codes(query: Tensor, key: KVHandle, value: KVHandle, pattern: Pattern) -> bool:
    """Whether a decode step over quantized storage needs no dequantized copy."""
    is_quantized = key.scale is not None or value.scale is not None
    is_plain = pattern.starts is None and (pattern.sinks is None or pattern.sinks.dim() == 1)
    return is_quantized and is_plain and query.shape[2] == 1 and not torch.is_grad_enabled()


def _pieces(
    query: Tensor, key: KVHandle, value: KVHandle, pattern: Pattern
) -> tuple[list[list[Tensor]], list[list[Tensor]]] | None:
    """Keys and values of each row in the pieces that they lie in, where plain causal attention takes them so."""
    _, is_causal, window, softcap, sinks, starts, mask = pattern
    is_plain = is_causal and all(extra is None for extra in (window, softcap, sinks, mask))
    if not is_plain or (starts is not None and starts != key.starts):
        return None
    if query.shape[-1] != value.shape[-1] or torch.is_grad_enabled() or not can_attend_pieces(query):
        return None
    key.check_valid()
    keys, values = key.pieces(), value.pieces()
    # A row whose own new tokens are not all there has queries that stand at padding.
    if keys is None or values is None or min(sum(piece.shape[1] for piece in row) for row in keys) < query.shape[2]:
        return None
    return keys, values


def _obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> str | None:
    """Why the kernels cannot take this call; None where they can."""
    dims = (query.shape[-1], value.shape[-1])
    if any(dim % 8 or not 32 <= dim <= 256 for dim in dims):
        return f"head sizes {dims} (kernels take multiples of 8 from 32 to 256)"
    if query.dtype not in _KERNEL_DTYPES:
        return f"{query.dtype} (kernels take float16, bfloat16 and float32)"
    if dropout or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return "training (kernels have no gradient)"
    if pattern.sinks is not None and pattern.sinks.dim() != 1:
        return "sinks that differ by query"
    return None


@cache
def _say_once(obstacle: str) -> None:
    logger.warning("hf_kvopt attention takes PyTorch's SDPA instead of its Triton kernels: got %s", obstacle)


dispatch.define_op(
    "attend_fixed",
    "(Tensor query, Tensor key_codes, Tensor? key_scale, Tensor value_codes, Tensor? value_scale, Tensor block_table, "
    "Tensor seq_lens, Tensor? centre, SymInt kv_len, ScalarType key_dtype, ScalarType value_dtype, bool rotates, "
    f"{dispatch.PATTERN}) -> Tensor",
    _attend_fixed,
    _attend_fixed_fake,
)
