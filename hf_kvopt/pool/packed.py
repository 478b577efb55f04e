"""PackedKV: keys or values of several caches at once, as one packed forward over unlike rows hands them on.

    packed text   a7 | b3 | c12 c13 c14 | d0 d1 d2 d3 d4        [1, tokens]: each token has the position of its own row
    cuts          two rows of one token | one row of 3 | one of 5
                  each cut has a cache of its own, and keys and values behind it

A `Cut` says which tokens of the packed text are the rows of one cache. Rows of a cut may bring unlike numbers of
tokens: the shorter ones repeat their last token up to the longest, for the cache and the attention alone, and what is
computed of the repeats is dropped (Orca, OSDI 2022: batch what is one operation a token, and attention row by row).
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.pool.lazy import LazyTensor


class Cut:
    """The tokens of a packed text that are the rows of one cache.

    Args:
        first: place of the first token in the packed text.
        counts: tokens of each row, at least one; rows follow each other in the packed text.
        device: where the packed text lies.
    """

    def __init__(self, first: int, counts: Sequence[int], device: torch.device) -> None:
        self.first, self.counts = first, list(counts)
        self.num_rows, self.q_len, self.num_tokens = len(self.counts), max(self.counts), sum(self.counts)
        self.is_even = self.num_tokens == self.num_rows * self.q_len
        # [num_rows * q_len] places of the rows, repeats included, and [num_tokens] those among them that are no repeats
        self._places: Tensor | None = None
        self._kept: Tensor | None = None
        if not self.is_even:
            starts = [first + sum(self.counts[:i]) for i in range(self.num_rows)]
            places = [
                start + min(column, count - 1)
                for start, count in zip(starts, self.counts, strict=True)
                for column in range(self.q_len)
            ]
            kept = [row * self.q_len + column for row, count in enumerate(self.counts) for column in range(count)]
            self._places = torch.tensor(places, device=device)
            self._kept = torch.tensor(kept, device=device)

    def rows_of(self, states: Tensor) -> Tensor:
        """Return [num_rows, num_heads, q_len, dim] of packed states [1, num_heads, tokens, dim]."""
        if self._places is None:
            mine = states[0, :, self.first : self.first + self.num_tokens]
        else:
            mine = states[0].index_select(1, self._places)
        return mine.unflatten(1, (self.num_rows, self.q_len)).transpose(0, 1)

    def packed(self, out: Tensor) -> Tensor:
        """Pack the attention of each row, out [num_rows, q_len, num_heads, dim], to [1, num_tokens, num_heads, dim]."""
        flat = out.flatten(0, 1)
        return (flat if self._kept is None else flat.index_select(0, self._kept))[None]


class PackedKV(LazyTensor):
    """Keys or values [1, num_kv_heads, tokens, head_dim] of a packed forward: those of its new tokens by shape, and one
    tensor for each cut with all that the rows of this cut may see.

    No dense tensor stands for it, as rows of unlike caches hold unlike pasts: only attention that knows it may compute.
    """

    parts: list[Tensor]
    cuts: list[Cut]

    @staticmethod
    def __new__(cls: type, parts: Sequence[Tensor], cuts: Sequence[Cut]) -> "PackedKV":
        """See the class; `parts[i]` [cuts[i].num_rows, num_kv_heads, kv_len, head_dim]."""
        num_tokens = sum(cut.num_tokens for cut in cuts)
        _, num_heads, _, dim = parts[0].shape
        packed: Any = PackedKV.wrap((1, num_heads, num_tokens, dim), parts[0].dtype, parts[0].device)
        packed.parts, packed.cuts = list(parts), list(cuts)
        return packed

    def map(self, change: Callable[..., tuple[Tensor, Tensor]], other: "PackedKV") -> tuple[Tensor, Tensor]:
        """Two of these made by `change` of each part of this one and of `other`."""
        pairs = [change(mine, theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)]
        return PackedKV([a for a, _ in pairs], self.cuts), PackedKV([b for _, b in pairs], self.cuts)

    def dense(self) -> Tensor:
        self._refuse("a dense copy")

    def before_fallback(self, op: str) -> None:
        self._refuse(op)

    def rewrap(self) -> "PackedKV":
        return PackedKV(self.parts, self.cuts)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"PackedKV(shape={tuple(self.shape)}, rows={[cut.num_rows for cut in self.cuts]})"

    def _refuse(self, op: str) -> NoReturn:
        raise UnsupportedModel(
            f"this model computes with its cached keys or values outside of its attention ({op}): got a packed batch, "
            "whose rows hold unlike pasts; generate with model.generate and a PagedCache"
        )
