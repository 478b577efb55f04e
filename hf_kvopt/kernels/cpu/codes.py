"""One query a row over quantized storage, in plain torch: no dequantized keys or values are made.

    scores = (q . codes_k) * scale_k          out = sum((p * scale_v) * codes_v)

Scales touch the scores and the probabilities, which are head_dim times fewer than the codes; the codes themselves are
only widened to float32, a tile at a time, so that the tile is still in the core's cache when the product reads it.
"""

import torch
from torch import Tensor

from hf_kvopt.kernels.calls import AttentionCall, KVView
from hf_kvopt.kernels.cpu.dense import mask_scores, softmax_beside
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.quant import Format, Quantized, get_format, widen, widen_planes

# Channels of one tile over all rows and heads, 8 MiB in float32: at 2 KV heads of 64 a tile of 8,192 tokens takes 0.6x
# the time of eight of 1,024 (2 cores), whose products are too small.
_TILE_CHANNELS = 1 << 21


def accepts(call: AttentionCall) -> bool:
    """Take one query a row over quantized storage, of rows that begin together."""
    q, k, v, pattern, dropout = call
    if (
        not isinstance(k, KVView)
        or not isinstance(v, KVView)
        or dropout
        or k.states is not None
        or v.states is not None
    ):
        return False
    is_quantized = k.plane.scale is not None or v.plane.scale is not None
    is_plain = pattern.starts is None and (pattern.sinks is None or pattern.sinks.dim() == 1)
    return is_quantized and is_plain and q.shape[2] == 1 and not torch.is_grad_enabled() and not call.needs_centre


def run(call: AttentionCall) -> Tensor:
    """Multiply with the codes."""
    q, k, v, pattern, _ = call
    assert isinstance(k, KVView)
    assert isinstance(v, KVView)
    return decode_codes(
        k.for_codes(q), k.codes(), v.codes(), (get_format(k.spec.format), get_format(v.spec.format)), pattern
    )


def decode_codes(
    q: Tensor,  # [batch, num_heads, 1, head_dim]
    k: Quantized,  # [batch, num_kv_heads, kv_len, width], [batch, num_kv_heads, kv_len, *scale_shape]
    v: Quantized,
    formats: tuple[Format, Format],
    pattern: Pattern,  # sinks [num_heads]; no starts
) -> Tensor:
    """Attention of the last position to all keys: [batch, 1, num_heads, v_head_dim] in q's dtype."""
    scale, is_causal, window, softcap, sinks, _, mask = pattern
    if is_causal and window is not None and window < k.codes.shape[2]:
        k, v = _last(k, window), _last(v, window)
        mask = None if mask is None else mask[..., -window:]
    batch, num_heads, _, dim = q.shape
    num_kv_heads = k.codes.shape[1]
    folded = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, dim).float() * scale
    tiles = _tiles(k.codes.shape[:3], dim)
    parts = [_scores(folded, k.codes[:, :, tile], _cut(k.scale, tile), formats[0]) for tile in tiles]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # [batch, num_kv_heads, group, kv_len]
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        by_head = mask.shape[1] > 1
        scores = mask_scores(scores, mask.reshape(len(mask), *scores.shape[1:3], -1) if by_head else mask)
    p = softmax_beside(scores, None if sinks is None else sinks.reshape(1, *scores.shape[1:3], 1))
    out = sum(_weighted(p[..., tile], v.codes[:, :, tile], _cut(v.scale, tile), formats[1]) for tile in tiles)
    assert isinstance(out, Tensor)
    return out.reshape(batch, 1, num_heads, -1).to(q.dtype)


def _last(x: Quantized, window: int) -> Quantized:
    return Quantized(x.codes[:, :, -window:], None if x.scale is None else x.scale[:, :, -window:])


def _tiles(shape: torch.Size, dim: int) -> list[slice]:
    """The kv axis of [batch, num_kv_heads, kv_len] in even pieces."""
    batch, num_kv_heads, kv_len = shape
    most = max(16, _TILE_CHANNELS // max(1, batch * num_kv_heads * dim))
    size = -(-kv_len // max(1, -(-kv_len // most)))
    return [slice(first, min(first + size, kv_len)) for first in range(0, kv_len, max(1, size))] or [slice(0, 0)]


def _cut(scale: Tensor | None, tile: slice) -> Tensor | None:
    return None if scale is None else scale[:, :, tile].float()


def _scores(q: Tensor, codes: Tensor, scale: Tensor | None, fmt: Format) -> Tensor:
    """Return [batch, num_kv_heads, group, tile] of q [batch, num_kv_heads, group, head_dim]."""
    if scale is None:
        return torch.matmul(q, codes.float().transpose(2, 3))
    if fmt.codes_per_byte == 1:
        numbers, factor = widen(codes, fmt)
        scores = torch.matmul(q, numbers.transpose(2, 3))
        return scores.mul_((scale if factor == 1.0 else scale * factor).unsqueeze(2))
    # The nibbles are numbers from 0 to 15; what they lack, -8, is one number a query.
    parts = []
    for plane, numbers in enumerate(widen_planes(codes)):
        part = q[..., plane::2]
        scores = torch.matmul(part, numbers.transpose(2, 3)).sub_(8.0 * part.sum(-1, keepdim=True))
        parts.append(scores.mul_(scale[..., plane].unsqueeze(2)))
    return parts[0].add_(parts[1])


def _weighted(p: Tensor, codes: Tensor, scale: Tensor | None, fmt: Format) -> Tensor:
    """Return [batch, num_kv_heads, group, v_head_dim] of p [batch, num_kv_heads, group, tile]."""
    if scale is None:
        return torch.matmul(p, codes.float())
    if fmt.codes_per_byte == 1:
        numbers, factor = widen(codes, fmt)
        return torch.matmul(p * (scale if factor == 1.0 else scale * factor).unsqueeze(2), numbers)
    parts = []
    for plane, numbers in enumerate(widen_planes(codes)):
        weights = p * scale[..., plane].unsqueeze(2)
        parts.append(torch.matmul(weights, numbers).sub_(8.0 * weights.sum(-1, keepdim=True)))
    return torch.stack(parts, dim=-1).flatten(-2)
