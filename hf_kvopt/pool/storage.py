"""Storage of one layer: how blocks encode keys and values.

    codes  [num_blocks, block_size, num_kv_heads, width]     width == head_dim, less where codes are packed
    scale  [num_blocks, block_size, num_kv_heads]            one a token and head (int4: two), absent for native

A token is written once, alone, with its own scale, so a row never depends on its neighbours and a block that is
copied or shared carries everything with it. What is read is codes * scale, the same at every later read. Coarse keys
are stored less their row's centre and rotated (`quant.guard`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.blocks import row_views, strided
from hf_kvopt.kernels.calls import KVSpec, KVView, PlaneWrite, StoreCall, Stored, restored
from hf_kvopt.kernels.cpu.place import place_of
from hf_kvopt.kernels.devices import require_format, require_format_somewhere, runs_kernel
from hf_kvopt.kernels.store import writer_for
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.centres import Centres
from hf_kvopt.pool.fixed_rows import FixedCentres
from hf_kvopt.pool.reads import LayerReads
from hf_kvopt.pool.slots import shared_runs, writable
from hf_kvopt.quant import (
    NATIVE,
    NATIVE_KV,
    NO_GUARD,
    SCALE_DTYPE,
    Format,
    Guard,
    KVFormat,
    Quantized,
    guard_for,
)


class Plane:
    """The keys or the values of one layer.

    Args:
        states: a tensor [batch, num_kv_heads, any, head_dim] as the model makes them: gives shape, dtype and device.
        block_size: tokens a block.
        num_blocks: blocks to hold memory for.
        fmt: how they are stored.
        guard: what is done to them before.

    Raises:
        ValueError: the format cannot pack this head_dim.
        UnsupportedDevice: the device has no such format.
    """

    def __init__(
        self, states: Tensor, block_size: int, num_blocks: int, fmt: Format = NATIVE, guard: Guard = NO_GUARD
    ) -> None:
        require_format(fmt, states)
        self.num_heads, self.dim = states.shape[1], states.shape[-1]
        self.dtype, self.home = states.dtype, states.device
        self.block_size, self.format = block_size, fmt
        # Of where it computes: offloaded blocks that grow in CPU memory come back as kernels want them.
        self.heads_first = not runs_kernel(states)
        self.rotates = guard.rotates
        self._hold(*self._blocks(num_blocks, states.device))
        self.centres = Centres(self.num_heads, self.dim, num_blocks, states.device) if guard.centres else None
        self.row_centres: FixedCentres | None = None  # in place of those where rows are of fixed capacity

    def __getstate__(self) -> dict[str, object]:
        codes = self.codes
        if codes.dtype.is_floating_point and codes.itemsize == 1:
            codes = codes.view(torch.uint8)  # torch 2.13 pickles float8 tensors, but cannot read them
        return {**self.__dict__, "stored": (codes, self.scale)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        codes, scale = state["stored"]
        self._hold(codes.view(self.format.code_dtype or self.dtype), scale)

    @property
    def codes(self) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, width]."""
        return self.stored.codes

    @property
    def scale(self) -> Tensor | None:
        """[num_blocks, block_size, num_kv_heads, *scale_shape]; None for native storage."""
        return self.stored.scale

    @property
    def num_blocks(self) -> int:
        """Blocks that memory is held for."""
        return self.codes.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All that holds memory: the codes and, where there are any, the scales."""
        return self.stored.tensors

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks and scales included."""
        beside = [tensor for centres in (self.centres, self.row_centres) if centres for tensor in centres.tensors]
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.tensors, *beside))

    def no_tokens(self, batch: int) -> Tensor:
        """[batch, num_kv_heads, 0, head_dim]: states such as this plane holds, but none."""
        return torch.empty(batch, self.num_heads, 0, self.dim, dtype=self.dtype, device=self.home)

    def write_of(self, states: Tensor, centre: Tensor | None = None) -> PlaneWrite:
        """Return a write of states [batch, num_kv_heads, tokens, head_dim], less centre [batch, heads, dim]."""
        return PlaneWrite(self.stored, self.format, states, centre)

    def centre_of(self, table: BlockTable) -> Tensor | None:
        """[batch, num_kv_heads, head_dim] that was taken from each row of `table`; None where nothing was."""
        return None if self.centres is None else self.centres.of_rows(table)

    def read(self, table: BlockTable, kv_len: int, skip: int = 0) -> Tensor:
        """[batch, num_kv_heads, kv_len, head_dim], from the column `skip` behind the table's base on.

        A view of native storage where rows lie evenly in the pool, else a copy; a column without a token reads as some
        other, finite one.
        """
        return self.view(table, kv_len, skip).dense()

    def read_even(self, batch: int, tokens: int, centre: Tensor | None) -> Tensor:
        """[batch, num_kv_heads, tokens, head_dim] of rows that lie one behind the other from slot 0 on."""
        parts = [strided(x, 0, tokens, batch, tokens) for x in self.tensors]
        spec = KVSpec((batch, self.num_heads, tokens, self.dim), self.dtype, self.format.name, self.rotates)
        return restored(Quantized(*parts), spec, centre)

    def view(self, table: BlockTable, kv_len: int, skip: int, states: Tensor | None = None) -> KVView:
        """Return `kv_len` tokens of every row, `skip` tokens in, by reference; see `KVView`."""
        centre = None if self.centres is None else self.centres.of_rows(table)
        spec = KVSpec((len(table.rows), self.num_heads, kv_len, self.dim), self.dtype, self.format.name, self.rotates)
        return KVView(self.stored, table, spec, skip, table.version, centre, states)

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Move to `num_blocks` blocks, block `src[i]` becoming `dst[i]`; the rest is zero."""
        codes, scale = self._blocks(num_blocks, self.codes.device)
        for before, after in zip(self.tensors, [codes] if scale is None else [codes, scale], strict=True):
            for first, length in shared_runs(src, dst):
                a, b = src[first], dst[first]
                after[b : b + length].copy_(before[a : a + length])
        if self.centres is not None:
            self.centres.resize(num_blocks, src, dst)
        self._hold(codes, scale)  # only now: another thread may be reading

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Copy block `src[i]` to `dst[i]`, scales included."""
        for tensor in self.tensors:
            for a, b in zip(src, dst, strict=True):
                tensor[b].copy_(tensor[a])
        if self.centres is not None:
            self.centres.copy_blocks(src, dst)

    def move_slots(self, src: Tensor, dst: Tensor) -> None:
        """Copy the tokens in slots `src` [n] to slots `dst`."""
        for held in (self.codes, self.scale):
            if held is not None:
                # index_put knows no float8: its bytes are moved.
                flat = (held.view(torch.uint8) if held.element_size() == 1 else held).flatten(0, 1)
                flat[dst] = flat[src]

    def select_rows(self, indices: list[int]) -> None:
        """Let row i, an equal share of the blocks, be what row `indices[i]` was."""
        for tensor in self.tensors:
            rows = row_views(tensor, len(indices))
            rows.copy_(rows[indices])

    def to(self, device: torch.device) -> None:
        """Move the bytes, in place of the object."""
        with torch.inference_mode(False):
            scale = None if self.scale is None else self.scale.to(device, non_blocking=True)
            self._hold(self.codes.to(device, non_blocking=True), scale)
        if self.centres is not None:
            self.centres.to(device)

    def _hold(self, codes: Tensor, scale: Tensor | None) -> None:
        """Take these tensors for storage."""
        codes, scale = writable(codes), None if scale is None else writable(scale)
        # One value: whoever took it before keeps tensors and addresses that belong together.
        self.stored = Stored(codes, scale, self.rotates, place_of(codes, scale))

    def _blocks(self, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Zeros for codes and scales."""
        width = self.format.packed_dim(self.dim)
        codes = self._zeros(num_blocks, (width,), self.format.code_dtype or self.dtype, device)
        if not self.format.has_scale:
            return codes, None
        return codes, self._zeros(num_blocks, self.format.scale_shape, SCALE_DTYPE, device)

    def _zeros(self, num_blocks: int, tail: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, *tail]."""
        # A tensor made in inference mode could not be written outside of it. Zeros, because a masked slot is still
        # multiplied by its zero probability, and zero times an old NaN is NaN.
        with torch.inference_mode(False):
            if not self.heads_first:
                return torch.zeros((num_blocks, self.block_size, self.num_heads, *tail), dtype=dtype, device=device)
            # The heads outermost in memory: a core then streams one head's keys without gaps
            # (0.75x time at 8 KV heads of 128, where tokens would lie 4 KiB apart and share their L1 sets).
            shape = (self.num_heads, num_blocks, self.block_size, *tail)
            return torch.zeros(shape, dtype=dtype, device=device).movedim(0, 2)


class KVPool:
    """Keys and values of one layer; follows the allocator's block numbers.

    Args:
        key_states: [batch, num_kv_heads, any, head_dim]: gives shape, dtype and device.
        value_states: the same for values.
        block_size: tokens a block.
        num_blocks: of the allocator that this pool follows.
        format: how keys and values are stored.

    Raises:
        ValueError, UnsupportedDevice: see `Plane`.
    """

    def __init__(
        self,
        key_states: Tensor,
        value_states: Tensor,
        block_size: int,
        num_blocks: int,
        format: KVFormat = NATIVE_KV,
    ) -> None:
        guard = guard_for(format.k) if format.guard else NO_GUARD
        self.keys = Plane(key_states, block_size, num_blocks, format.k, guard)
        self.values = Plane(value_states, block_size, num_blocks, format.v)
        self.format, self.is_native = format, format.is_native
        self.reads = LayerReads()
        self._choose_writer()

    def _choose_writer(self) -> None:
        """Take the first backend that writes states such as this pool holds."""
        parts = tuple(plane.write_of(plane.no_tokens(1)) for plane in self.planes)
        self.writer = writer_for(StoreCall(parts, lambda: torch.empty(0, dtype=torch.int64)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "writer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._choose_writer()  # another machine may have other backends

    @property
    def planes(self) -> tuple[Plane, Plane]:
        """Keys, values."""
        return self.keys, self.values

    def matches(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether states come from a layer of the same geometry and dtype, on the device where this one computes."""
        k, v = self.keys, self.values
        _, k_heads, _, k_dim = key_states.shape
        _, v_heads, _, v_dim = value_states.shape
        shapes, dtypes = (k_heads, k_dim, v_heads, v_dim), (key_states.dtype, value_states.dtype)
        is_alike = shapes == (k.num_heads, k.dim, v.num_heads, v.dim) and dtypes == (k.dtype, v.dtype)
        return is_alike and (key_states.device, value_states.device) == (k.home, v.home)

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks included."""
        return sum(plane.num_bytes for plane in self.planes)

    def write(self, key_states: Tensor, value_states: Tensor, table: BlockTable, start: int, stop: int) -> None:
        """Store the states of the columns `start` to `stop`, the last ones given; rows that begin with the first one
        given learn the centre of their keys."""
        centre = None if self.keys.centres is None else self._learn(key_states, table, start, stop)
        dropped = key_states.shape[2] - (stop - start)
        if dropped:
            key_states, value_states = key_states[:, :, dropped:], value_states[:, :, dropped:]
        span = table.span()
        even = None if span is None else (span[0] + start - table.base, span[1])
        slots = partial(table.slots, start, stop, key_states.device)
        self.store(key_states, value_states, centre, slots, even)

    def store(
        self,
        key_states: Tensor,
        value_states: Tensor,
        centre: Tensor | None,  # [batch, num_kv_heads, head_dim] that is taken from keys
        slots: Callable[[], Tensor],  # gives [batch * tokens] int64, -1 to skip
        even: tuple[int, int] | None = None,  # see `StoreCall`
    ) -> None:
        """Store states [batch, num_kv_heads, tokens, head_dim] at `slots`."""
        k, v = self.keys, self.values
        parts = PlaneWrite(k.stored, k.format, key_states, centre), PlaneWrite(v.stored, v.format, value_states)
        call = StoreCall(parts, slots, even)
        is_usual = type(key_states) is Tensor is type(value_states) and not torch.compiler.is_compiling()
        (self.writer if is_usual else writer_for(call)).run(call)

    def as_stored(self, key_states: Tensor, value_states: Tensor, table: BlockTable) -> tuple[Tensor, Tensor]:
        """Return states [batch, num_kv_heads, tokens, head_dim] as they are read back from rows of `table`."""
        if self.is_native:
            return key_states, value_states
        batch, _, tokens, _ = key_states.shape
        num_blocks = -(-batch * tokens // self.keys.block_size)
        twin = KVPool(key_states, value_states, self.keys.block_size, num_blocks, self.format)
        centre = self.keys.centre_of(table)
        slots = partial(torch.arange, batch * tokens, device=key_states.device)
        twin.store(key_states, value_states, centre, slots, (0, tokens))
        return twin.keys.read_even(batch, tokens, centre), twin.values.read_even(batch, tokens, None)

    def _learn(self, key_states: Tensor, table: BlockTable, start: int, stop: int) -> Tensor | None:
        """Return the centre that is taken from keys of these columns, and store again what it makes different."""
        assert self.keys.centres is not None
        centre, anew = self.keys.centres.before_write(key_states, table, start, stop)
        for row, block, keys in anew:
            first = block * self.keys.block_size
            slots = partial(torch.arange, first, first + keys.shape[1], device=keys.device)
            part = self.keys.write_of(keys[None], None if centre is None else centre[row : row + 1])
            call = StoreCall((part,), slots)
            writer_for(call).run(call)
        return centre

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """See `Plane.resize`; the transient is one plane."""
        for plane in self.planes:
            plane.resize(num_blocks, src, dst)

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """See `Plane.copy_blocks`."""
        for plane in self.planes:
            plane.copy_blocks(src, dst)

    def move_slots(self, src: list[int], dst: list[int]) -> None:
        """See `Plane.move_slots`."""
        index = torch.tensor([src, dst]).to(self.keys.codes.device, non_blocking=True)
        for plane in self.planes:
            plane.move_slots(index[0], index[1])
            if plane.centres is not None:
                plane.centres.move_slots(src, dst, plane.block_size)

    def to(self, device: torch.device) -> None:
        """See `Plane.to`."""
        for plane in self.planes:
            plane.to(device)


def require_readable(format: KVFormat) -> None:
    """Raise UnsupportedDevice where there are CUDA cards of which none can read the format."""
    for fmt in (format.k, format.v):
        require_format_somewhere(fmt)
