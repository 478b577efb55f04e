"""Storage of one layer: how blocks encode keys and values.

    codes  [num_blocks, block_size, num_kv_heads, width]     width == head_dim, less where codes are packed
    scale  [num_blocks, block_size, num_kv_heads]            one a token and head (int4: two), absent for native

A token is written once, alone, with its own scale, so a row never depends on its neighbours and a block that is
copied or shared carries everything with it. What is read is codes * scale, the same at every later read. Coarse keys
are stored less their row's centre and rotated (`quant.guard`).
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.cpu.paged_attention import Place, place_of
from hf_kvopt.kernels.cpu.store import can_store, store_states
from hf_kvopt.kernels.ops import require_format, require_format_somewhere, runs_kernel, store_kv
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.centres import Centres
from hf_kvopt.pool.fixed_rows import FixedCentres
from hf_kvopt.pool.handle import HandleSpec, KVHandle
from hf_kvopt.pool.slots import gathered, shared_runs, strided, writable
from hf_kvopt.quant import (
    NATIVE,
    NATIVE_KV,
    NO_GUARD,
    SCALE_DTYPE,
    Format,
    Guard,
    KVFormat,
    Quantized,
    dequantize,
    guard_for,
    guarded,
    quantize,
    unguarded,
)

# Elements up to which quantizing keys and values in one pass, copied together, costs less.
_ONE_PASS = 1 << 16


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
        self.num_fallbacks = 0
        self.is_first = False  # the first layer that made a pool: the one at which a whole forward is checked
        self.slides: bool | None = None  # whether transformers' own cache would slide here; not known at first
        self.owner: weakref.ref[object] | None = None  # the attention module that filled it
        self._hold(*self._blocks(num_blocks, states.device))
        self.rotates = guard.rotates
        self.centres = Centres(self.num_heads, self.dim, num_blocks, states.device) if guard.centres else None
        self.row_centres: FixedCentres | None = None  # in place of those where rows are of fixed capacity

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "owner": None, "place": None}
        if self.codes.dtype.is_floating_point and self.codes.itemsize == 1:
            state["codes"] = self.codes.view(torch.uint8)  # torch 2.13 pickles float8 tensors, but cannot read them
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self.codes.view(self.format.code_dtype or self.dtype), self.scale)

    @property
    def num_blocks(self) -> int:
        """Blocks that memory is held for."""
        return self.codes.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All that holds memory: the codes and, where there are any, the scales."""
        return [self.codes] if self.scale is None else [self.codes, self.scale]

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks and scales included."""
        beside = [tensor for centres in (self.centres, self.row_centres) if centres for tensor in centres.tensors]
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.tensors, *beside))

    def no_tokens(self, batch: int) -> Tensor:
        """[batch, num_kv_heads, 0, head_dim]: states such as this plane holds, but none."""
        return torch.empty(batch, self.num_heads, 0, self.dim, dtype=self.dtype, device=self.home)

    def place_for(self, states: Tensor) -> Place | None:
        """Where states are stored by a kernel that was compiled for this CPU; None where torch does it."""
        return self.place if self.place is not None and can_store(states, self.place) else None

    def encode(self, states: Tensor, centre: Tensor | None = None) -> Quantized:
        """States [batch, num_kv_heads, tokens, head_dim] as they are stored, less centre, each vector alone."""
        if self.place_for(states) is None:
            return quantize(self.guarded(states, centre), self.format, SCALE_DTYPE)
        batch, _, tokens, _ = states.shape
        codes, scale = self._blocks(-(-batch * tokens // self.block_size), states.device)
        place = place_of(codes, scale)
        assert place is not None
        store_states(states, place, torch.arange(batch * tokens, device="cpu"), centre, self.rotates)
        return Quantized(*(strided(x, 0, tokens, batch, tokens) for x in (codes, scale) if x is not None))

    def guarded(self, states: Tensor, centre: Tensor | None) -> Tensor:
        """States [batch, num_kv_heads, tokens, head_dim] as they go into a format, less centre [batch, heads, dim]."""
        return guarded(states, self.rotates, centre)

    def restored(self, states: Tensor, centre: Tensor | None) -> Tensor:
        """Undo `guarded`: return keys as they were before centring and rotation."""
        return unguarded(states, self.rotates, centre)

    def centre_of(self, table: BlockTable) -> Tensor | None:
        """[batch, num_kv_heads, head_dim] that was taken from each row of `table`; None where nothing was."""
        return None if self.centres is None else self.centres.of_rows(table)

    def learn(self, states: Tensor, table: BlockTable, start: int, stop: int) -> Tensor | None:
        """[batch, num_kv_heads, head_dim] that is taken from states for the columns `start` to `stop`, the last ones
        given: rows that begin with the first one given learn it."""
        if self.centres is None:
            return None
        centre, anew = self.centres.before_write(states, table, start, stop)
        for row, block, keys in anew:
            encoded = self.encode(keys[None], None if centre is None else centre[row : row + 1])
            first = block * self.block_size
            self.store(encoded, torch.arange(first, first + keys.shape[1], device=keys.device))
        return centre

    def as_stored(self, states: Tensor, table: BlockTable) -> Tensor:
        """States [batch, num_kv_heads, tokens, head_dim] as they are read back from rows of `table`."""
        if not self.format.has_scale:
            return states
        centre = self.centre_of(table)
        read = dequantize(*self.encode(states, centre), self.format)
        return self.restored(read, centre).to(self.dtype)

    def write(self, encoded: Quantized, table: BlockTable, start: int, stop: int) -> None:
        """Store codes [batch, num_kv_heads, stop - start, width] and their scales at the columns `start` to `stop`."""
        span = table.span()
        if span is not None:
            slot, rows = span[0] + start - table.base, (span[1], len(table.rows), stop - start)
            strided(self.codes, slot, *rows).copy_(encoded.codes)
            if self.scale is not None:
                strided(self.scale, slot, *rows).copy_(encoded.scale)  # type: ignore[arg-type]
            return
        slots = table.slots(start, stop, encoded.codes.device)
        if start >= max(table.lags):
            self.store(encoded, slots.reshape(-1))
            return
        for row, row_slots in enumerate(slots):
            kept = row_slots >= 0
            self.store(Quantized(*(x[row : row + 1, :, kept] for x in encoded.parts)), row_slots[kept])

    def store(self, encoded: Quantized, slots: Tensor) -> None:
        """Store codes [batch, num_kv_heads, tokens, width] and their scales at `slots` [batch * tokens]."""
        for held, new in zip(self.tensors, encoded.parts, strict=True):
            tokens = new.transpose(1, 2).flatten(0, 1)
            # index_put knows no float8: its bytes are written.
            as_bytes = torch.uint8 if held.element_size() == 1 else held.dtype
            held.view(-1, *held.shape[2:]).view(as_bytes).index_put_((slots,), tokens.view(as_bytes))

    def read(self, table: BlockTable, kv_len: int, skip: int = 0) -> Tensor:
        """[batch, num_kv_heads, kv_len, head_dim], from the column `skip` behind the table's base on.

        A view of native storage where rows lie evenly in the pool, else a copy; a column without a token reads as some
        other, finite one.
        """
        codes = self.read_codes(table, kv_len, skip)
        if self.centres is None and not self.rotates:
            return dequantize(*codes, self.format, self.dtype)
        return self.restored(dequantize(*codes, self.format), self.centre_of(table)).to(self.dtype)

    def read_codes(self, table: BlockTable, kv_len: int, skip: int = 0) -> Quantized:
        """The same as codes [batch, num_kv_heads, kv_len, width] and scales [batch, num_kv_heads, kv_len]."""
        span = table.span()
        if span is not None:
            parts = [strided(x, span[0] + skip, span[1], table.batch_size, kv_len) for x in self.tensors]
        else:
            slots = table.gather_slots(skip, kv_len, self.codes.device)
            parts = [gathered(x, slots) for x in self.tensors]
        return Quantized(parts[0], parts[1] if self.format.has_scale else None)

    def handle(
        self, table: BlockTable, kv_len: int, skip: int, is_fresh: bool, states: Tensor | None = None
    ) -> KVHandle:
        """`kv_len` tokens of every row, `skip` tokens in, by reference."""
        shape = (len(table.rows), self.num_heads, kv_len, self.dim)
        spec = HandleSpec(shape, self.dtype, self.format.name, self.rotates)
        centre = None if self.centres is None else self.centres.of_rows(table)
        return KVHandle(
            self.codes, self.scale, None, None, spec, self, table, skip, is_fresh, states, centre, self.place
        )

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

    def to(self, device: torch.device) -> None:
        """Move the bytes, in place of the object."""
        with torch.inference_mode(False):
            scale = None if self.scale is None else self.scale.to(device, non_blocking=True)
            self._hold(self.codes.to(device, non_blocking=True), scale)
        if self.centres is not None:
            self.centres.to(device)

    def _hold(self, codes: Tensor, scale: Tensor | None) -> None:
        """Take these tensors for storage."""
        self.codes, self.scale = writable(codes), None if scale is None else writable(scale)
        self.place = place_of(self.codes, self.scale)

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
            if runs_kernel(torch.empty(0, device=device)):
                return torch.zeros((num_blocks, self.block_size, self.num_heads, *tail), dtype=dtype, device=device)
            # The same layout with the heads outermost in memory: a core then streams one head's keys without gaps
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
        self.is_native = format.is_native

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
        """Store the states of the columns `start` to `stop`, the last ones given: one launch where kernels run."""
        is_kernel = runs_kernel(key_states)
        given, dropped = key_states, key_states.shape[2] - (stop - start)
        if dropped:
            key_states, value_states = key_states[:, :, dropped:], value_states[:, :, dropped:]
        span = table.span() if self.is_native and not is_kernel else None
        if span is not None:
            where = span[0] + start - table.base, span[1], len(table.rows), stop - start
            strided(self.keys.codes, *where).copy_(key_states)
            strided(self.values.codes, *where).copy_(value_states)
            return
        centre = self.keys.learn(given, table, start, stop)
        if is_kernel:
            slots = table.slots(start, stop, key_states.device).reshape(-1)
            self.store(self.keys.guarded(key_states, centre), value_states, slots)
            return
        places = self.keys.place_for(key_states), self.values.place_for(value_states)
        if any(places):
            slots = table.slots(start, stop, key_states.device)
            parts = (self.keys, key_states, centre), (self.values, value_states, None)
            for place, (plane, states, taken) in zip(places, parts, strict=True):
                if place is not None:
                    store_states(states, place, slots, taken, plane.rotates)
                else:
                    plane.write(plane.encode(states, taken), table, start, stop)
        else:
            keys, values = self._encoded(self.keys.guarded(key_states, centre), value_states)
            self.keys.write(keys, table, start, stop)
            self.values.write(values, table, start, stop)

    def store(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> None:
        """Store states [batch, num_kv_heads, tokens, head_dim], keys guarded, at `slots` [batch * tokens]."""
        if runs_kernel(key_states) or torch.compiler.is_compiling():
            key_states, value_states = (x if x.stride(-1) == 1 else x.contiguous() for x in (key_states, value_states))
            keys, values = self.planes
            store_kv(key_states, value_states, keys.codes, values.codes, slots, keys.scale, values.scale)
            return
        places = self.keys.place_for(key_states), self.values.place_for(value_states)
        if any(places):
            for place, plane, states in zip(places, self.planes, (key_states, value_states), strict=True):
                if place is not None:
                    store_states(states, place, slots)
                else:
                    plane.store(quantize(states, plane.format, SCALE_DTYPE), slots)
        else:
            for plane, encoded in zip(self.planes, self._encoded(key_states, value_states), strict=True):
                plane.store(encoded, slots)

    def _encoded(self, key_states: Tensor, value_states: Tensor) -> tuple[Quantized, Quantized]:
        """Keys, guarded, and values as they are stored; in one pass where both are stored alike."""
        keys, values = self.keys.format, self.values.format
        is_one_pass = keys is values and keys.has_scale and key_states.shape == value_states.shape
        if not is_one_pass or key_states.numel() > _ONE_PASS:
            return quantize(key_states, keys, SCALE_DTYPE), quantize(value_states, values, SCALE_DTYPE)
        codes, scale = quantize(torch.stack((key_states, value_states.to(key_states.dtype))), keys, SCALE_DTYPE)
        assert scale is not None
        return Quantized(codes[0], scale[0]), Quantized(codes[1], scale[1])

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
