"""KVHandle: what a cache hands to a model instead of keys or values; the whole contract between cache and attention.

It looks like `[batch, num_kv_heads, kv_len, head_dim]`. Our attention takes the `KVView` out of it and reads the blocks
in place; every other operation gets a gathered, dequantized copy. A handle is valid until the next `update` or other
change of its cache; a later use raises.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.kernels.calls import EqualRows, KVSpec, KVView, Stored, TableRows
from hf_kvopt.kernels.sealed_kv import SealedStep
from hf_kvopt.pool.lazy import LazyTensor
from hf_kvopt.pool.reads import LayerReads, StepGuard

if TYPE_CHECKING:
    from hf_kvopt.pool.block_table import BlockTable

# The tensors of a handle in a compiled graph.
_SEALED_PARTS = SealedStep._fields
_PARTS = ("codes", "scale", "block_table", "seq_lens", "centre", "mask", *_SEALED_PARTS)
logger = logging.getLogger(__name__)
__all__ = ["EqualRows", "KVHandle", "KVSpec", "KVView", "SealedStep", "Stored", "TableRows"]


class KVHandle(LazyTensor):
    """Keys or values of one layer, by reference.

    Args:
        view: what it stands for.
        reads: what is known of the reads of this layer; None for rows of fixed capacity, whose handles are made of
            tensors alone.
        is_fresh: set by `update`, cleared by the attention that follows it: the one that owns this layer of the cache.

    `mask` [batch, 1, 1, kv_len] bool says in a graph which columns each row holds and sees, where rows differ; it takes
    the place of the model's mask. `guard` is how a reader has the cache take the step back; the cache sets it.
    """

    codes: Tensor
    scale: Tensor | None
    block_table: Tensor | None
    seq_lens: Tensor | None
    centre: Tensor | None
    mask: Tensor | None
    token: Tensor | None = None  # this and the next four: see `SealedStep`; of a growing cache nothing sets them
    means: Tensor | None = None
    exact: Tensor | None = None
    exact_table: Tensor | None = None
    lags: Tensor | None = None
    spec: KVSpec
    table: "BlockTable | None"
    reads: LayerReads | None
    is_fresh: bool
    guard: StepGuard | None
    _view: KVView

    @staticmethod
    def __new__(
        cls: type, view: KVView, reads: LayerReads | None = None, is_fresh: bool = False, mask: Tensor | None = None
    ) -> "KVHandle":
        """See the class."""
        spec, stored, rows = view.spec, view.plane, view.rows
        codes = stored.codes
        handle: Any = torch.Tensor._make_wrapper_subclass(KVHandle, spec.shape, dtype=spec.dtype, device=codes.device)
        # One by one: a compiled graph sees tensors that are attributes, and no others.
        handle.codes, handle.scale, handle.centre, handle.spec = codes, stored.scale, view.centre, spec
        handle.mask = mask
        if stored.sealed is not None:
            handle.token, handle.means, handle.exact, handle.exact_table, handle.lags = stored.sealed
        if isinstance(rows, EqualRows):
            handle.block_table, handle.seq_lens, handle.table = *rows, None
        else:
            handle.block_table, handle.seq_lens, handle.table = None, None, rows
        handle._view, handle.reads, handle.is_fresh, handle.guard = view, reads, is_fresh, None
        return handle

    @property
    def is_all_new(self) -> bool:
        """Return whether all that is held came with the last update, and no fork holds anything of before."""
        return self.table is not None and not self.table.step_start and len(self.table.allocator.holders) == 1

    @property
    def starts(self) -> list[int] | None:
        """First column of each row, among those handed out, that holds a token; None where it is the first one."""
        return None if self.table is None else self.table.starts(self._view.skip, self.spec.shape[2])

    def dense(self) -> Tensor:
        return self._view.dense().contiguous()

    def before_fallback(self, op: str) -> None:
        if self.is_fresh and self.table is not None and self.table.policy is not None:
            if self.guard is not None:
                self.guard.undo(self.table)
            raise UnsupportedModel(
                f"keys and values of a cache with {self.table.policy} have gaps that only hf_kvopt's attention knows: "
                f"got {op} on them; load the model with attn_implementation='hf_kvopt', or use a cache without a policy"
            )
        if self.reads is not None:
            self.reads.num_fallbacks += 1
        _say_once(op)

    def rewrap(self) -> "KVHandle":
        twin = KVHandle(self._view, self.reads, self.is_fresh, self.mask)
        twin.guard = self.guard
        return twin

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"KVHandle(shape={self.spec.shape}, dtype={self.spec.dtype}, format={self.spec.format!r})"

    def __tensor_flatten__(self) -> tuple[list[str], KVSpec]:
        if self.table is not None:
            raise CacheStateError(
                "a growing cache cannot enter a compiled graph: got its handle under torch.compile; use "
                "PagedCache(max_tokens=..., compileable=True)"
            )
        return [n for n in _PARTS if getattr(self, n) is not None], self.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: KVSpec, *_: Any) -> "KVHandle":
        sealed = SealedStep(*map(inner.get, _SEALED_PARTS)) if "exact" in inner else None  # type: ignore[arg-type]
        plane = Stored(inner["codes"], inner.get("scale"), spec.rotates, sealed=sealed)
        rows = spec.rows(inner["block_table"], inner["seq_lens"])
        return KVHandle(KVView(plane, rows, spec, centre=inner.get("centre")), mask=inner.get("mask"))


def view_of(handle: KVHandle) -> KVView:
    """Return the frozen view that kernels take; in a compiled graph, which knows tensors alone, one made of these."""
    # A table grows, which no graph knows.
    if handle.table is not None or not torch.compiler.is_compiling():
        return handle._view
    assert handle.block_table is not None
    assert handle.seq_lens is not None
    stored, rows = Stored(handle.codes, handle.scale), handle.spec.rows(handle.block_table, handle.seq_lens)
    if handle.exact is not None:
        sealed = SealedStep(handle.token, handle.means, handle.exact, handle.exact_table, handle.lags)  # type: ignore[arg-type]
        stored = Stored(handle.codes, None, False, None, sealed)
    return KVView(stored, rows, handle.spec, centre=handle.centre)


@cache
def _say_once(op: str) -> None:
    logger.warning("%s is not read in place: keys or values were gathered from the paged cache into a copy for it", op)
