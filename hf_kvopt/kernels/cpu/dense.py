"""Attention in plain torch, fast on a CPU: softmax(scale * q k^T + mask) v without a [q_len, kv_len] tensor.

- A query head group reads its KV head once: at decode the group is folded into the query axis, so K and V are never
  repeated (in a prefill SDPA's own grouped kernel does the same).
- Plain patterns need no mask: causal squares go to SDPA as they are, left padding is cut off row by row, a window
  narrows the keys. What is left is done in query tiles, each with a mask of its own size.
- Soft capping, learned sinks and differing head sizes, which SDPA does not know, take the written-out softmax.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.kernels.calls import AttentionCall, KVView
from hf_kvopt.kernels.pattern import Pattern

# What becomes of scores: scale, softcap, sinks [batch | 1, num_heads, q_len, 1] and dropout.
_Scoring = tuple[float, float | None, Tensor | None, float]
# Elements of one tile's scores: 64 MiB in float32, and large enough that a matrix product pays.
_TILE_SCORES = 1 << 24
_TILE_ROWS = 256
_LONG_ROW = 6144


def accepts(call: AttentionCall) -> bool:
    """Take every call."""
    return True


def run(call: AttentionCall) -> Tensor:
    """Attend to dense keys and values, or what views stand for."""
    q, k, v, pattern, dropout = call
    k, v = (x.dense() if isinstance(x, KVView) else x for x in (k, v))
    return attend(q, k, v, pattern, dropout)


def attend(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim]
    v: Tensor,  # [batch, num_kv_heads, kv_len, v_head_dim]
    pattern: Pattern,  # sinks may be [batch, num_heads, q_len, 1] here: one for each query
    dropout: float = 0.0,
) -> Tensor:
    """Attention with queries aligned to the end of the keys: query i sits at position kv_len - q_len + i.

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, in q's dtype. A row that may see no key is zero or the mean
        of some values; it is padding.
    """
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    starts = starts.tolist() if isinstance(starts, Tensor) else starts  # one look, where no kernel takes the call
    if starts is not None and any(starts):
        return _attend_padded(q, k, v, pattern, starts, dropout)
    q_len, kv_len = q.shape[2], k.shape[2]
    if is_causal and q_len == 1:
        is_causal = False
        if window is not None and window < kv_len:
            k, v = k[:, :, -window:], v[:, :, -window:]
            mask = None if mask is None else mask[..., -window:]
        window = None
    if window is not None and window >= kv_len:
        window = None
    if sinks is not None and sinks.dim() == 1:
        sinks = sinks[None, :, None, None].expand(-1, -1, q_len, -1)
    scoring = (scale, softcap, sinks, dropout)
    if not is_causal and window is None:
        if q_len == 1:
            return _decode(q, k, v, mask, scoring)
        if mask is None and _is_plain(q, v, scoring):
            return _tile(q, k, v, None, scoring).transpose(1, 2).contiguous()
    if mask is None and window is None and q_len == kv_len and _is_plain(q, v, scoring):
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).contiguous()
    tiles = []
    for first in range(0, q_len, _tile_rows(q, k)):
        last = min(q_len, first + _tile_rows(q, k))
        lo, hi, tile_mask = _tile_mask(first, last, q_len, kv_len, is_causal, window, mask, q.device)
        tile_sinks = None if sinks is None else sinks[:, :, first:last]
        tile_scoring = (scale, softcap, tile_sinks, dropout)
        tile = _tile(q[:, :, first:last], k[:, :, lo:hi], v[:, :, lo:hi], tile_mask, tile_scoring)
        tiles.append(tile.transpose(1, 2))
    return torch.cat(tiles, dim=1) if tiles else q.new_zeros(q.shape[0], 0, q.shape[1], v.shape[-1])


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, starts: Sequence[int], dropout: float) -> Tensor:
    """Each row without the keys, and without the queries, that are padding."""
    batch, num_heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    sinks, mask = pattern.sinks, pattern.mask
    out = q.new_zeros(batch, q_len, num_heads, v.shape[-1])
    rows = []
    for row, start in enumerate(starts):
        # Without a causal order a query's position says nothing, so none of them is known to be padding.
        first = max(0, start - (kv_len - q_len)) if pattern.is_causal else 0
        if first == q_len or start == kv_len:
            rows.append(out[row : row + 1])
            continue
        one = slice(row, row + 1)
        row_mask = None
        if mask is not None:
            row_mask = mask[one if mask.shape[0] > 1 else slice(None), :, (first if mask.shape[2] > 1 else 0) :, start:]
        row_sinks = sinks
        if sinks is not None and sinks.dim() == 4:
            row_sinks = sinks[one if len(sinks) > 1 else slice(None), :, first:]
        row_pattern = pattern._replace(starts=None, mask=row_mask, sinks=row_sinks)
        real = attend(q[one, :, first:], k[one, :, start:], v[one, :, start:], row_pattern, dropout)
        rows.append(torch.cat([out[one, :first], real], dim=1))
    return torch.cat(rows)


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: _Scoring) -> Tensor:
    """One query a row: the heads of a KV group become the queries of one attention over that KV head."""
    scale, softcap, sinks, dropout = scoring
    batch, num_heads, _, dim = q.shape
    num_kv_heads = k.shape[1]
    folded = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, dim)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], num_kv_heads, -1, mask.shape[-1])
    if not _is_plain(q, v, scoring):
        heads = None if sinks is None else sinks.reshape(len(sinks), num_kv_heads, -1, 1)
        out = _written_out(folded, k, v, mask, (scale, softcap, heads, dropout))
    elif mask is None and not dropout and _is_long(q, k):
        out = _decode_long(folded, k, v, scale)
    else:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=_fitting(mask, q), dropout_p=dropout, scale=scale)
    return out.reshape(batch, 1, num_heads, v.shape[-1])


def _decode_long(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One long row in float32 as two matrix products; q is [1, num_kv_heads, group, head_dim].

    SDPA's CPU kernel multiplies a few query rows with 512 keys at a time; over thousands of keys two whole products,
    the long axis first, take 0.86x its time (2 cores, 2 KV heads of 64, 8k tokens), and 1.1x at 1k.
    """
    scores = torch.bmm(k[0], (q[0] * scale).transpose(1, 2)).transpose(1, 2)
    return torch.bmm(torch.softmax(scores, dim=-1), v[0])[None]


def _is_long(q: Tensor, k: Tensor) -> bool:
    is_row = q.device.type == "cpu" and len(q) == 1 and q.dtype == torch.float32
    return is_row and k.shape[2] >= _LONG_ROW and not torch.compiler.is_compiling()


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: _Scoring) -> Tensor:
    """Return [batch, num_heads, tile, v_head_dim] of a tile of queries against the keys that it is given."""
    scale, softcap, sinks, dropout = scoring
    batch, num_heads, rows, dim = q.shape
    num_kv_heads = k.shape[1]
    if _is_plain(q, v, scoring):
        mask, is_grouped = _fitting(mask, q), num_heads != num_kv_heads
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=is_grouped
        )
    group = num_heads // num_kv_heads
    folded = q.reshape(batch, num_kv_heads, group * rows, dim)
    if mask is not None:
        mask = mask.expand(-1, num_heads if mask.shape[1] > 1 else group, rows, -1)
        mask = mask.reshape(mask.shape[0], -1 if mask.shape[1] > group else 1, group * rows, mask.shape[-1])
    heads = None
    if sinks is not None:
        heads = sinks.reshape(len(sinks), num_kv_heads, group * rows, 1)
    out = _written_out(folded, k, v, mask, (scale, softcap, heads, dropout))
    return out.reshape(batch, num_heads, rows, v.shape[-1])


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: _Scoring) -> Tensor:
    """softmax over [scores, sink] of which the sink's share is dropped; scores and sums in float32 at least."""
    scale, softcap, sinks, dropout = scoring
    scores = _matmul_rows(q, k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = mask_scores(scores, mask)
    probs = softmax_beside(scores, sinks)
    probs = F.dropout(probs, dropout) if dropout else probs
    return _matmul_rows(probs.to(v.dtype), v)


def mask_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [batch, heads, rows, kv_len] under a mask, bool or additive, that broadcasts to them."""
    # The least finite value, not -inf: a row that may see nothing stays finite.
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, least) if mask.dtype == torch.bool else (scores + mask).clamp(min=least)


def softmax_beside(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax over [scores, sink] of which the sink's share is dropped; sinks are [batch | 1, heads, rows, 1]."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.to(scores.dtype).expand(scores.shape[0], -1, -1, -1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _matmul_rows(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [batch, heads, ...], row by row: in one go, matmul copies `b` where batch and heads do not merge.

    That is so for every view of a pool; a decode step of 8 rows and 1,024 keys takes 0.25x the time (1 core).
    """
    return torch.matmul(a, b) if len(a) == 1 else torch.stack([torch.matmul(x, y) for x, y in zip(a, b, strict=True)])


def _tile_mask(
    first: int, last: int, q_len: int, kv_len: int, is_causal: bool, window: int | None, mask: Tensor | None,
    device: torch.device,
) -> tuple[int, int, Tensor | None]:  # fmt: skip
    """The keys [lo, hi) that queries `first` to `last` can see, and the mask among those."""
    offset = kv_len - q_len
    lo = 0 if window is None else max(0, offset + first - window + 1)
    hi = offset + last if is_causal else kv_len
    given = None if mask is None else mask[:, :, first:last] if mask.shape[2] > 1 else mask
    given = None if given is None else given[..., lo:hi]
    if not is_causal and window is None:
        return lo, hi, given
    rows = torch.arange(offset + first, offset + last, device=device)[:, None]
    columns = torch.arange(lo, hi, device=device)
    seen = columns <= rows if is_causal else columns < kv_len
    if window is not None:
        seen = seen & (columns > rows - window)
    seen = seen[None, None]
    if given is None:
        return lo, hi, seen
    if given.dtype == torch.bool:
        return lo, hi, seen & given
    return lo, hi, torch.where(seen, given, torch.finfo(given.dtype).min)


def _tile_rows(q: Tensor, k: Tensor) -> int:
    scores_per_row = q.shape[0] * q.shape[1] * k.shape[2]
    return max(16, min(_TILE_ROWS, _TILE_SCORES // max(1, scores_per_row)))


def _is_plain(q: Tensor, v: Tensor, scoring: _Scoring) -> bool:
    return scoring[1] is None and scoring[2] is None and q.shape[-1] == v.shape[-1]


def _fitting(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """SDPA takes additive masks in the queries' dtype only."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
