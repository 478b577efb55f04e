"""Attention over rows whose keys lie in several pieces of memory, each read where it is: for shared prefixes on a CPU.

    row 0   [ prefix, shared ][ own 0 ]        out = sum_j exp(lse_j - lse) out_j      lse = log sum_j exp(lse_j)
    row 1   [ prefix, shared ][ own 1 ]        a piece that rows share is read once, for the queries of all of them

Partial results are merged by their log-sum-exp, as in cascade inference (Hydragen, arXiv:2402.05099). Gathering the
rows instead would copy the whole cache at each step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Returns the log-sum-exp beside the output, which `scaled_dot_product_attention` does not.
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class Partial(NamedTuple):
    """Attention over some of the keys."""

    out: Tensor  # [batch, num_heads, q_len, head_dim]
    lse: Tensor  # [batch, num_heads, q_len] float32


def can_attend_pieces(q: Tensor) -> bool:
    """Whether this torch, device and dtype have what the merge needs."""
    return _flash is not None and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


def attend_pieces(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    keys: Sequence[Sequence[Tensor]],  # for each row its pieces [num_kv_heads, tokens, head_dim], in order
    values: Sequence[Sequence[Tensor]],
    scale: float,
) -> Tensor:
    """Causal attention; row i's queries are its last q_len tokens, of which each row has at least as many.

    Returns:
        [batch, q_len, num_heads, head_dim] contiguous, in q's dtype.
    """
    q_len = q.shape[2]
    if q_len == 1:
        parts = _seen_whole(q, keys, values, scale)
    else:
        before = [_split(row, q_len) for row in keys], [_split(row, q_len) for row in values]
        parts = _seen_whole(q, [k for k, _ in before[0]], [v for v, _ in before[1]], scale)
        parts.append(_own(q, [k for _, k in before[0]], [v for _, v in before[1]], scale))
    merged = parts[0]
    for part in parts[1:]:
        merged = _merge(merged, part)
    return merged.out.transpose(1, 2).to(q.dtype).contiguous()


def _seen_whole(
    q: Tensor, keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], scale: float
) -> list[Partial]:
    """One result for each place in the rows' lists of pieces, every query seeing all of a piece."""
    parts = []
    for place in range(max(map(len, keys))):
        sharing: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(keys):
            if place < len(row):
                sharing.setdefault((row[place].data_ptr(), row[place].shape[1]), []).append(i)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32)
        for rows in sharing.values():
            k, v = keys[rows[0]][place], values[rows[0]][place]
            found = _over_shared(q if len(rows) == len(q) else q[rows], k, v, scale)
            if len(rows) == len(q):
                out, lse = found
            else:
                out[rows], lse[rows] = found
        parts.append(Partial(out, lse))
    return parts


def _over_shared(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """All rows of q over the same keys: rows and the heads of a KV group become queries of one attention."""
    batch, num_heads, q_len, dim = q.shape
    num_kv_heads = len(k)
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, q_len)
    folded = q.reshape(*shape, dim).transpose(0, 1).reshape(1, num_kv_heads, -1, dim)
    out, lse = _flash(folded, k[None], v[None], 0.0, False, scale=scale)  # type: ignore[misc]
    split = (num_kv_heads, batch, *shape[2:])
    out = out.reshape(*split, dim).transpose(0, 1).reshape(q.shape)
    return Partial(out, lse.reshape(split).transpose(0, 1).reshape(q.shape[:3]))


def _own(q: Tensor, keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], scale: float) -> Partial:
    """The triangle of each row's queries over their own keys."""
    found = [
        _flash(q[i : i + 1], _joined(k)[None], _joined(v)[None], 0.0, True, scale=scale)  # type: ignore[misc]
        for i, (k, v) in enumerate(zip(keys, values, strict=True))
    ]
    return Partial(torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found]))


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def _split(pieces: Sequence[Tensor], num_last: int) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces before the last `num_last` tokens, and those of them."""
    before = list(pieces)
    own: list[Tensor] = []
    while num_last:
        piece = before.pop()
        count = min(num_last, piece.shape[1])
        own.insert(0, piece[:, piece.shape[1] - count :])
        if count < piece.shape[1]:
            before.append(piece[:, : piece.shape[1] - count])
        num_last -= count
    return before, own


def _merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    # A row without a key on one side has -inf there; on both sides it keeps the zeros that it has.
    share = torch.sigmoid(b.lse - a.lse).nan_to_num(0.0)[..., None].to(a.out.dtype)
    return Partial(torch.lerp(a.out, b.out, share), torch.logaddexp(a.lse, b.lse))
