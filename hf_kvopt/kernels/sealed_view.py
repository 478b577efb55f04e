"""SealedView: the `KVView` of a layer whose full blocks are sealed.

A query reads old blocks sealed and new ones exact, and which are old depends on where it stands. No one tensor says
that for several queries: whoever needs one gets what the last token of each row reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.kernels.calls import KVSpec, KVView, Rows, Stored
from hf_kvopt.kernels.cpu.sealed_place import SealedPlace
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import BothForms
from hf_kvopt.quant import Quantized
from hf_kvopt.quant.sealed_formats import BlockCodec

# Blocks of queries, in a row of which all that they read exact has a place; see `quant.sealed_formats.tail_blocks`.
FEW_BLOCKS = 3


class SealedRows(Rows, Protocol):
    """Rows whose blocks are sealed when they are full; see `pool.tail`."""

    rows: list[list[int]]
    lags: list[int]
    base: int
    clock: int
    block_size: int

    @property
    def origin(self) -> int:
        """The column that tokens are counted from where their blocks are numbered."""
        ...

    @property
    def first_block(self) -> int:
        """The number of each row's first block that is held."""
        ...

    @property
    def is_ragged(self) -> bool:
        """Return whether some row begins later than the first column."""
        ...

    def exact_table(self, device: torch.device) -> Tensor:
        """Return [batch, max_blocks] int32: where the exact ones of each row's blocks lie."""
        ...


class SealedStorage(Protocol):
    """Keys or values in both forms; see `pool.sealed`."""

    exact: Tensor
    codec: BlockCodec
    block_size: int

    @property
    def sealed_place(self) -> SealedPlace | None:
        """Return where the tensors lie, for the compiled kernel of a CPU."""
        ...

    def both_forms(self, new: Tensor | None = None) -> BothForms:
        """All that is stored, and the states of the last tokens, as kernels take them."""
        ...

    def unsealed(self, blocks: Tensor) -> Tensor:
        """Return what stored blocks [n] stand for, [n, num_kv_heads, block_size, head_dim] float32."""
        ...

    def read(self, table: Any, kv_len: int, skip: int = 0) -> Tensor:
        """Return what a query at the last token of each row reads, [batch, num_kv_heads, kv_len, head_dim]."""
        ...

    def read_blocks(self, table: Any, rows: Sequence[int], first: int, stop: int, tile: int) -> Tensor:
        """Blocks of some rows as queries of block `tile` read them."""
        ...


class SealedSource(Protocol):
    """The storage of a layer, whose tensors move."""

    def write(self, states: Tensor, table: Any, start: int, stop: int) -> None:
        """Store states of the columns `start` to `stop`, and seal what becomes full."""
        ...

    def view(
        self, table: Any, kv_len: int, skip: int, states: Tensor | None = None, arrived: Tensor | None = None
    ) -> SealedView:
        """Return some tokens of every row by reference."""
        ...


class SealedView(KVView):
    """Keys or values of one layer by reference, in two forms.

    `storage` has both, where they lay when the view was taken: a layer may be offloaded behind it; `source` is the
    layer's own. `arrived` are the states [batch, num_kv_heads, tokens, head_dim] of the last columns, where they are at
    hand: a long step leaves most of them nowhere else.
    """

    storage: SealedStorage
    source: SealedSource
    arrived: Tensor | None

    @classmethod
    def of(
        cls,
        storage: SealedStorage,
        rows: SealedRows,
        spec: KVSpec,
        skip: int,
        states: Tensor | None,
        arrived: Tensor | None,
    ) -> SealedView:
        """Make a view of the rows as they are now."""
        view = cls(Stored(storage.exact, None), rows, spec, skip, rows.version, None, states)
        view.storage, view.arrived = storage, arrived
        return view

    @property
    def table(self) -> SealedRows:
        """The rows."""
        return self.rows  # type: ignore[return-value]

    def codes(self) -> Quantized:
        """Raise CacheStateError: the two forms are no one tensor."""
        raise CacheStateError("sealed and exact blocks are not one tensor of codes: got codes(); use dense()")

    def dense(self) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, head_dim] as a query at the last token of each row reads it."""
        self.check_valid()
        if self.states is not None:
            return self.states
        return self.storage.read(self.rows, self.spec.shape[2], self.skip)


def depths(pattern: Pattern, q_len: int) -> Tensor | None:
    """Return [q_len] int32: by how much each query's position is behind that of the first, where it is not its number.

    Nodes of a tree of drafts stand behind one another in the cache, and see their ancestors among them alone.
    """
    mask = pattern.mask
    if pattern.is_causal or mask is None or mask.shape[2] != q_len or q_len == 1 or len(mask) > 1:
        return None
    new = mask[0, 0, :, -q_len:]
    seen = new if new.dtype == torch.bool else new > torch.finfo(new.dtype).min
    found = seen.sum(dim=1).sub_(1).clamp_(min=0).minimum(torch.arange(q_len, device=seen.device))
    return found.to(torch.int32)
