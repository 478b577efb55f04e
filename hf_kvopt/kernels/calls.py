"""Calls of a backend as frozen values: one attention over what a layer holds, or one write to it.

    AttentionCall ─► q, pattern, k and v ─► KVView ─► plane (codes, scale)   rows (block table)   columns
    StoreCall     ─► new states and their slots ─► plane

`kernels.attention` has the ordered list of backends that read, `kernels.store` of those that write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.kernels.blocks import gathered, row_views
from hf_kvopt.kernels.cpu.address import PoolAddress
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import SealedStep
from hf_kvopt.kernels.shared_blocks import SharedBlocks
from hf_kvopt.quant import Format, Quantized, dequantize, get_format, rotate, unguarded


class Stored(NamedTuple):
    """The keys, or the values, of one layer as they lie in blocks.

    Args:
        codes: [num_blocks, block_size, num_kv_heads, width].
        scale: [num_blocks, block_size, num_kv_heads, *scale_shape]; None for native storage.
        rotates: whether vectors are rotated before they are stored.
        address: where the tensors lie, for the compiled kernels of a CPU; None where those cannot read or write them.
        sealed: where `codes` are those of sealed blocks, the rest of them.
    """

    codes: Tensor
    scale: Tensor | None
    rotates: bool = False
    address: PoolAddress | None = None
    sealed: SealedStep | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The codes and, where there are any, the scales."""
        return [self.codes] if self.scale is None else [self.codes, self.scale]


# Block table [batch, max_blocks], tokens held [batch] and columns before the first one [batch], or None; all int32.
RowTensors = tuple[Tensor, Tensor, Tensor | None]


class Rows(Protocol):
    """Which blocks hold the tokens of each row."""

    @property
    def version(self) -> int:
        """Counts changes: a view that was taken before one is out of date."""
        ...

    def tensors_up_to(self, columns: int, device: torch.device) -> RowTensors:
        """The rows as attention reads them, without what lies behind the first `columns` columns that are held."""
        ...

    def shared_blocks(
        self, columns: int, q_len: int, starts: Tensor | Sequence[int] | None, device: torch.device
    ) -> SharedBlocks | None:
        """Return what rows share of the tokens that all of their last `q_len` queries see; None for nothing."""
        ...

    def numbers(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return [len(numbers)] int32 on a device."""
        ...

    def read(self, x: Tensor, skip: int, kv_len: int) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, ...]: columns `skip` to `skip + kv_len` of a tensor of the plane."""
        ...


class EqualRows(NamedTuple):
    """Rows of fixed capacity: row r owns the r-th equal share of the blocks, and lengths live on the device."""

    block_table: Tensor  # [batch, max_blocks] int32
    seq_lens: Tensor  # [batch] int32

    @property
    def version(self) -> int:
        """Always 0: addresses never change."""
        return 0

    def tensors_up_to(self, columns: int, device: torch.device) -> RowTensors:
        """The rows as they are: `columns` may be the whole capacity."""
        return self.block_table, self.seq_lens, None

    def shared_blocks(self, *_: Any) -> None:
        """Nothing: the host knows no block of a graph."""

    def numbers(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """A copy: only prompts, which run uncompiled, have numbers."""
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    def read(self, x: Tensor, skip: int, kv_len: int) -> Tensor:
        """A view: lengths may change under a CUDA graph."""
        return row_views(x, len(self.block_table))[:, :, :kv_len]


class TableRows(EqualRows):
    """Rows whose blocks lie anywhere in the pool; block table, lengths and addresses of these are on the device."""

    __slots__ = ()

    def read(self, x: Tensor, skip: int, kv_len: int) -> Tensor:
        """A copy."""
        size = x.shape[1]
        columns = torch.arange(skip, skip + kv_len, device=x.device)
        blocks = self.block_table[:, columns // size].long()
        return gathered(x, blocks * size + columns % size)


class KVSpec(NamedTuple):
    """Everything about stored keys or values that is no tensor; hashable, so that torch.compile can guard on it."""

    shape: tuple[int, int, int, int]  # batch, num_kv_heads, kv_len, head_dim
    dtype: torch.dtype  # of the states that a model sees
    format: str
    rotates: bool = False  # before it was quantized: a query must be, too
    is_scattered: bool = False  # rows in a graph lie anywhere, and own no equal shares of the blocks
    is_key: bool = False  # of sealed blocks, whose keys and values have codecs of their own

    def rows(self, block_table: Tensor, seq_lens: Tensor) -> EqualRows:
        """Make the rows of a graph out of their tensors."""
        return (TableRows if self.is_scattered else EqualRows)(block_table, seq_lens)


class KVView(NamedTuple):
    """Keys or values of one layer by reference: a plane, the rows, and the columns of them that are handed out.

    Args:
        plane: the storage.
        rows: whose tokens lie where.
        spec: shape, dtype and storage format.
        skip: tokens held that lie before the first column (they are behind a window); negative where the rows never
            held all of the states.
        version: of the rows when this view was taken.
        centre: [batch, num_kv_heads, head_dim] that was taken from each row's keys; a plain softmax needs it not.
        states: the very tensor that this view stands for, where it is still at hand (a first prefill), or where the
            rows never held all of it (a step longer than the window). Beside quantized storage only where it is read
            instead.
    """

    plane: Stored
    rows: Rows
    spec: KVSpec
    skip: int = 0
    version: int = 0
    centre: Tensor | None = None
    states: Tensor | None = None

    def check_valid(self) -> None:
        """Raise CacheStateError where the cache has moved on since this view was taken."""
        if self.version != self.rows.version:
            raise CacheStateError(
                "this KV handle is out of date: its cache was updated, cropped or reordered after it was made; "
                "take cache.layers[i].keys / .values again, or clone() them before the next step; where the model's "
                "own code does this, use transformers' cache, e.g. enable(model, cache=None)"
            )

    def row_tensors(self) -> RowTensors:
        """Block table, lengths and lags: how attention finds the tokens of each row; raises like `check_valid`."""
        if self.version != self.rows.version:
            self.check_valid()
        # A layer may hold fewer columns than its rows (it was not part of every forward).
        return self.rows.tensors_up_to(self.skip + self.spec.shape[2], self.plane.codes.device)

    def shared_blocks(self, q_len: int, pattern: Pattern) -> SharedBlocks | None:
        """Return the tokens that rows share and that all of their last `q_len` queries see; None for nothing."""
        batch, _, kv_len, _ = self.spec.shape
        is_narrow = pattern.window is not None and pattern.window < kv_len
        if batch == 1 or self.skip or is_narrow:
            return None
        return self.rows.shared_blocks(kv_len, q_len, pattern.starts, self.plane.codes.device)

    def codes(self) -> Quantized:
        """Codes [batch, num_kv_heads, kv_len, width], and scales, of the columns that are handed out."""
        self.check_valid()
        parts = [self.rows.read(x, self.skip, self.spec.shape[2]) for x in self.plane.tensors]
        return Quantized(*parts)

    def dense(self) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, head_dim]: a view of the pool where rows lie evenly, else a copy."""
        self.check_valid()
        if self.plane.sealed is not None:
            step, rows = self.plane.sealed, self.rows
            assert isinstance(rows, EqualRows)
            read: Tensor = torch.ops.hf_kvopt.read_sealed(
                self.plane.codes, *step, rows.block_table, rows.seq_lens, self.spec.format, self.spec.is_key
            )
            return read
        # A window has let go of the first of these tokens already, or they are wanted as they came.
        if self.states is not None and (self.skip < 0 or self.plane.scale is not None):
            return self.states
        return restored(self.codes(), self.spec, self.centre)

    def picked(
        self,
        slots: Tensor,  # [batch, num_kv_heads, n] int64
    ) -> Tensor:  # [batch, num_kv_heads, n, head_dim]
        """Return the tokens in the slots of each head, as a model sees them: a copy."""
        heads, parts = torch.arange(slots.shape[1], device=slots.device)[:, None], []
        for held in self.plane.tensors:
            # Not every device indexes float8: its bytes are picked.
            flat = (held.view(torch.uint8) if held.element_size() == 1 else held).flatten(0, 1)
            parts.append(flat[slots, heads].view(held.dtype))
        return restored(Quantized(*parts), self.spec, self.centre)

    def for_codes(self, q: Tensor) -> Tensor:
        """Return a query [..., head_dim] as it is to be multiplied with the codes of keys."""
        return rotate(q) if self.spec.rotates else q


def restored(codes: Quantized, spec: KVSpec, centre: Tensor | None) -> Tensor:
    """Return what a model sees of codes: dequantized, and keys as they were before centring and rotation."""
    fmt = get_format(spec.format)
    if centre is None and not spec.rotates:
        return dequantize(*codes, fmt, spec.dtype)
    return unguarded(dequantize(*codes, fmt), spec.rotates, centre).to(spec.dtype)


class AttentionCall(NamedTuple):
    """Attention of new queries over keys and values, dense or by reference."""

    q: Tensor  # [batch, num_heads, q_len, head_dim]
    k: Tensor | KVView  # [batch, num_kv_heads, kv_len, head_dim]
    v: Tensor | KVView  # [batch, num_kv_heads, kv_len, v_head_dim]
    pattern: Pattern  # sinks may be [batch, num_heads, q_len, 1] too: one for each query
    dropout: float = 0.0

    @property
    def needs_centre(self) -> bool:
        """Return whether it matters that all scores of a row are shifted alike: beside a sink, or under a cap."""
        is_shifted = isinstance(self.k, KVView) and self.k.centre is not None
        return is_shifted and (self.pattern.sinks is not None or self.pattern.softcap is not None)

    def shared_blocks(self, least_bytes: int) -> SharedBlocks | None:
        """Return what rows share of keys and values in blocks, where reading it once saves so many bytes of reads."""
        q, k, v, pattern, _ = self
        if not isinstance(k, KVView) or not isinstance(v, KVView) or k.states is not None:
            return None
        shared = k.shared_blocks(q.shape[2], pattern)
        if shared is None or shared.saved * sum(x.plane.codes[0, 0].nbytes for x in (k, v)) < least_bytes:
            return None
        return shared


class Reader(NamedTuple):
    """A backend that reads: attention, [batch, q_len, num_heads, v_head_dim] contiguous."""

    name: str
    accepts: Callable[[AttentionCall], bool]
    run: Callable[[AttentionCall], Tensor]


class PlaneWrite(NamedTuple):
    """New states of one plane."""

    plane: Stored
    format: Format
    states: Tensor  # [batch, num_kv_heads, tokens, head_dim]
    centre: Tensor | None = None  # [batch, num_kv_heads, head_dim] float32 that is taken from the states


class StoreCall(NamedTuple):
    """New keys and values, or one of them, and the slots that they go to."""

    parts: tuple[PlaneWrite, ...]
    slots: Callable[[], Tensor]  # gives [batch * tokens] int64 in any shape, -1 to skip
    even: tuple[int, int] | None = None  # slot of row 0's first token and slots from row to row, where rows lie evenly


class Writer(NamedTuple):
    """A backend that writes."""

    name: str
    accepts: Callable[[StoreCall], bool]
    run: Callable[[StoreCall], None]
