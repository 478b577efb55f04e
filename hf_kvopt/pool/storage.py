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

from hf_kvopt.kernels.calls import KVSpec, KVView, PlaneWrite, StoreCall
from hf_kvopt.kernels.devices import require_format_somewhere
from hf_kvopt.kernels.store import writer_for
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.plane import Plane
from hf_kvopt.pool.reads import LayerReads
from hf_kvopt.quant import (
    NATIVE_KV,
    NO_GUARD,
    KVFormat,
    guard_for,
)


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
        """Return whether states come from a layer of equal geometry and dtype, on the device of this one."""
        k, v = self.keys, self.values
        _, k_heads, _, k_dim = key_states.shape
        _, v_heads, _, v_dim = value_states.shape
        shapes, dtypes = (k_heads, k_dim, v_heads, v_dim), (key_states.dtype, value_states.dtype)
        is_alike = shapes == (k.num_heads, k.dim, v.num_heads, v.dim) and dtypes == (k.dtype, v.dtype)
        return is_alike and (key_states.device, value_states.device) == (k.home, v.home)

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks included."""
        bounds = 0 if self.reads.bounds is None else self.reads.bounds.num_bytes
        return sum(plane.num_bytes for plane in self.planes) + bounds

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
        if self.reads.bounds is not None:
            self.reads.bounds.note(self.keys, table, start, stop)

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

    def views(
        self,
        table: BlockTable,
        kv_len: int,
        skip: int,
        states: tuple[Tensor | None, Tensor | None],
        arrived: tuple[Tensor | None, Tensor | None] = (None, None),  # the step's, for storage that may need them
    ) -> tuple[KVView, KVView]:
        """Return keys and values of every row by reference; see `Plane.view`. One call, as every step makes it."""
        k, v = self.keys, self.values
        centre = None if k.centres is None else k.centres.of_rows(table)
        batch, version = len(table.rows), table.version
        k_spec = KVSpec((batch, k.num_heads, kv_len, k.dim), k.dtype, k.format.name, k.rotates)
        v_spec = KVSpec((batch, v.num_heads, kv_len, v.dim), v.dtype, v.format.name)
        return (
            KVView(k.stored, table, k_spec, skip, version, centre, states[0]),
            KVView(v.stored, table, v_spec, skip, version, None, states[1]),
        )

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
        if self.reads.bounds is not None:
            self.reads.bounds.resize(num_blocks, src, dst)

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Copy block `src[i]` to `dst[i]`; see `Plane.copy_blocks`."""
        index = torch.tensor([src, dst]).to(self.keys.codes.device, non_blocking=True)
        for plane in self.planes:
            plane.copy_blocks(index[0], index[1])
            if plane.centres is not None:
                plane.centres.copy_blocks(src, dst)
        if self.reads.bounds is not None:
            self.reads.bounds.copy_blocks(src, dst)

    def move_slots(self, src: list[int], dst: list[int]) -> None:
        """See `Plane.move_slots`."""
        index = torch.tensor([src, dst]).to(self.keys.codes.device, non_blocking=True)
        for plane in self.planes:
            plane.move_slots(index[0], index[1])
            if plane.centres is not None:
                plane.centres.move_slots(src, dst, plane.block_size)

    def move_heads(self, src: Tensor, dst: Tensor) -> None:
        """See `Plane.move_heads`."""
        device = self.keys.codes.device
        for plane in self.planes:
            plane.move_heads(src.to(device), dst.to(device))

    def to(self, device: torch.device) -> None:
        """See `Plane.to`."""
        for plane in self.planes:
            plane.to(device)


def require_readable(format: KVFormat) -> None:
    """Raise UnsupportedDevice where there are CUDA cards of which none can read the format."""
    for fmt in (format.k, format.v):
        require_format_somewhere(fmt)
