"""SealedPool: keys and values of one layer whose full blocks are sealed, see `pool.sealed`."""

from functools import partial

import torch
from torch import Tensor

from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.sealed_kv import SealCall
from hf_kvopt.kernels.sealed_view import SealedView
from hf_kvopt.kernels.store import sealer_for
from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.reads import LayerReads
from hf_kvopt.pool.sealed import SealedPlane
from hf_kvopt.quant.sealed_formats import SealedKV


class SealedPool:
    """Keys and values of one layer; follows the allocator's block numbers and its exact places.

    Args:
        key_states: [batch, num_kv_heads, any, head_dim]: gives shape, dtype and device.
        value_states: the same for values.
        allocator: see `SealedPlane`.
        sealed: the codecs.

    Raises:
        ValueError: see `SealedPlane`.
    """

    is_native = False

    def __init__(self, key_states: Tensor, value_states: Tensor, allocator: BlockAllocator, sealed: SealedKV) -> None:
        assert allocator.tails is not None
        self.tails = allocator.tails
        self.keys = SealedPlane(key_states, allocator, sealed.k)
        self.values = SealedPlane(value_states, allocator, sealed.v)
        self.tails.pools.append(self)
        self.reads = LayerReads()

    @property
    def planes(self) -> tuple[SealedPlane, SealedPlane]:
        """Keys, values."""
        return self.keys, self.values

    def matches(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Return whether states come from a layer of equal geometry and dtype, on the device of this one."""
        return self.keys.takes(key_states) and self.values.takes(value_states)

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks and exact ones included."""
        return sum(plane.num_bytes for plane in self.planes)

    @property
    def tail_bytes(self) -> int:
        """Bytes of exact blocks, free places included."""
        return sum(plane.tail_bytes for plane in self.planes)

    def write(self, key_states: Tensor, value_states: Tensor, table: BlockTable, start: int, stop: int) -> None:
        """Store the states of the columns `start` to `stop`, and seal what becomes full."""
        if runs_kernel(key_states) and self._write_by_kernel(key_states, value_states, table, start, stop):
            return
        for plane, states in zip(self.planes, (key_states, value_states), strict=True):
            plane.write(states, table, start, stop)

    def _write_by_kernel(
        self, key_states: Tensor, value_states: Tensor, table: BlockTable, start: int, stop: int
    ) -> bool:
        """Do what `write` does by the first backend that takes it; returns whether one did."""
        device, full = key_states.device, tail.completed(table, start, stop)
        k, v = self.keys.both_forms(key_states), self.values.both_forms(value_states)
        made = partial(tail.full_blocks, table, full, start, stop, device) if full else None
        call = SealCall(k, v, partial(tail.exact_slots, table, start, stop, device), made)
        sealer = sealer_for(call)
        if sealer is not None:
            sealer.run(call)
        return sealer is not None

    def views(
        self,
        table: BlockTable,
        kv_len: int,
        skip: int,
        states: tuple[Tensor | None, Tensor | None],
        arrived: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[SealedView, SealedView]:
        """Return keys and values of every row by reference; see `SealedPlane.view`."""
        k, v = self.planes
        return k.view(table, kv_len, skip, states[0], arrived[0]), v.view(table, kv_len, skip, states[1], arrived[1])

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """See `SealedPlane.resize`."""
        for plane in self.planes:
            plane.resize(num_blocks, src, dst)

    def resize_tails(self, capacity: int) -> None:
        """See `SealedPlane.resize_tails`."""
        for plane in self.planes:
            plane.resize_tails(capacity)

    def restore_tails(self, blocks: list[int]) -> None:
        """Fill the places of `blocks` with what their sealed form stands for."""
        places = [self.tails.places[block] for block in blocks]
        for plane in self.planes:
            index = torch.tensor(blocks, device=plane.exact.device)
            plane.exact[places] = plane.unsealed(index).transpose(1, 2).to(plane.dtype)

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Copy block `src[i]` to `dst[i]` in both forms."""
        places = self.tails.copied(src, dst)
        for plane in self.planes:
            plane.copy_blocks(src, dst, places)

    def move_slots(self, src: list[int], dst: list[int]) -> None:
        """Copy the tokens in slots `src` to slots `dst`, and seal the blocks that they went to anew."""
        places, size = self.tails.places, self.keys.block_size
        old, new = ([places[slot // size] * size + slot % size for slot in slots] for slots in (src, dst))
        touched = sorted({slot // size for slot in dst})
        for plane in self.planes:
            flat = plane.exact.view(-1, plane.num_heads, plane.dim)
            flat[new] = flat[old]
            plane.seal_places(touched, [places[block] for block in touched])

    def to(self, device: torch.device) -> None:
        """See `SealedPlane.to`."""
        for plane in self.planes:
            plane.to(device)
