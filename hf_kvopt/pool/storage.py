"""Storage of one layer: how blocks encode keys and values.

    codes  [num_blocks, block_size, num_kv_heads, width]     width == head_dim, less where codes are packed
    scale  [num_blocks, block_size, num_kv_heads]            one a token and head, absent for the native format

A token is written once, alone, with its own scale, so a row never depends on its neighbours and a block that is
copied or shared carries everything with it.
"""

import weakref
from itertools import pairwise

import torch
from torch import Tensor

from hf_kvopt.kernels.dispatch import runs_kernel, store_kv
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.handle import HandleSpec, KVHandle


class Plane:
    """The keys or the values of one layer.

    Args:
        states: a tensor [batch, num_kv_heads, any, head_dim] as the model makes them: gives shape, dtype and device.
        block_size: tokens a block.
        num_blocks: blocks to hold memory for.
    """

    def __init__(self, states: Tensor, block_size: int, num_blocks: int) -> None:
        self.num_heads, self.dim = states.shape[1], states.shape[-1]
        self.dtype, self.home = states.dtype, states.device
        self.block_size = block_size
        self.num_fallbacks = 0
        self.is_first = False  # the first layer that made a pool: the one at which a whole forward is checked
        self.slides: bool | None = None  # whether transformers' own cache would slide here; not known at first
        self.owner: weakref.ref[object] | None = None  # the attention module that filled it
        self.scale: Tensor | None = None
        self.codes = self._blocks(num_blocks)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "owner": None}

    @property
    def num_blocks(self) -> int:
        """Blocks that memory is held for."""
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks included."""
        return self.codes.untyped_storage().nbytes()

    def matches(self, states: Tensor) -> bool:
        """Whether `states` come from a layer of the same geometry."""
        return (states.shape[1], states.shape[-1], states.dtype) == (self.num_heads, self.dim, self.dtype)

    def write(self, states: Tensor, table: BlockTable, start: int, stop: int) -> None:
        """Store states [batch, num_kv_heads, stop - start, head_dim] at the columns `start` to `stop`."""
        span = table.span()
        if span is not None:
            first, pitch = span
            self._strided(first + start - table.base, pitch, table.batch_size, stop - start).copy_(states)
            return
        slots = table.slots(start, stop, states.device)
        if start >= max(table.lags):
            self.store(states, slots.reshape(-1))
            return
        for row, row_slots in enumerate(slots):
            kept = row_slots >= 0
            self.store(states[row : row + 1, :, kept], row_slots[kept])

    def store(self, states: Tensor, slots: Tensor) -> None:
        """Store states [batch, num_kv_heads, tokens, head_dim] at `slots` [batch * tokens]."""
        tokens = states.transpose(1, 2).reshape(-1, self.num_heads, self.dim)
        self.codes.view(-1, self.num_heads, self.dim).index_put_((slots,), tokens)

    def read(self, table: BlockTable, kv_len: int, skip: int = 0) -> Tensor:
        """[batch, num_kv_heads, kv_len, head_dim], from the column `skip` behind the table's base on.

        A view where rows lie evenly in the pool, else a copy; a column without a token reads as some other, finite one.
        """
        span = table.span()
        if span is not None:
            return self._strided(span[0] + skip, span[1], table.batch_size, kv_len)
        slots = table.gather_slots(skip, kv_len, self.codes.device)
        heads_first = self.codes.permute(2, 0, 1, 3)
        if heads_first.is_contiguous():
            picked = heads_first.flatten(1, 2).index_select(1, slots.reshape(-1))
            return picked.view(self.num_heads, *slots.shape, self.dim).transpose(0, 1)
        return self.codes.flatten(0, 1)[slots].transpose(1, 2)

    def handle(
        self, table: BlockTable, kv_len: int, skip: int, is_fresh: bool, states: Tensor | None = None
    ) -> KVHandle:
        """`kv_len` tokens of every row, `skip` tokens in, by reference."""
        shape = (table.batch_size, self.num_heads, kv_len, self.dim)
        spec = HandleSpec(shape, self.dtype, "native")
        return KVHandle(self.codes, self.scale, None, None, spec, self, table, skip, is_fresh, states)

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Move to `num_blocks` blocks, block `src[i]` becoming `dst[i]`; the rest is zero."""
        old, self.codes = self.codes, self._blocks(num_blocks, self.codes.device)
        for first, length in _runs(src, dst):
            a, b = src[first], dst[first]
            self.codes[b : b + length].copy_(old[a : a + length])

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Copy block `src[i]` to `dst[i]`."""
        for a, b in zip(src, dst, strict=True):
            self.codes[b].copy_(self.codes[a])

    def move_slots(self, src: Tensor, dst: Tensor) -> None:
        """Copy the tokens in slots `src` [n] to slots `dst`."""
        for held in (self.codes, self.scale):
            if held is not None:
                # index_put knows no float8: its bytes are moved.
                flat = (held.view(torch.uint8) if held.element_size() == 1 else held).flatten(0, 1)
                flat[dst] = flat[src]

    def to(self, device: torch.device) -> None:
        """Move the bytes, in place of the object."""
        self.codes = self.codes.to(device, non_blocking=True)

    def _strided(self, first: int, pitch: int, batch: int, length: int) -> Tensor:
        """[batch, num_kv_heads, length, dim] view: row r starts at slot first + r * pitch."""
        _, slot, head, _ = self.codes.stride()
        shape = (batch, self.num_heads, length, self.dim)
        return self.codes.as_strided(shape, (pitch * slot, head, slot, 1), first * slot)

    def _blocks(self, num_blocks: int, device: torch.device | None = None) -> Tensor:
        device = device or self.home
        like = torch.empty(0, device=device)
        # A tensor made in inference mode could not be written outside of it. Zeros, because a masked slot is still
        # multiplied by its zero probability, and zero times an old NaN is NaN.
        with torch.inference_mode(False):
            if runs_kernel(like):
                shape = (num_blocks, self.block_size, self.num_heads, self.dim)
                return torch.zeros(shape, dtype=self.dtype, device=device)
            # The same layout with the heads outermost in memory: a core then streams one head's keys without gaps
            # (0.75x time at 8 KV heads of 128, where tokens would lie 4 KiB apart and share their L1 sets).
            shape = (self.num_heads, num_blocks, self.block_size, self.dim)
            return torch.zeros(shape, dtype=self.dtype, device=device).permute(1, 2, 0, 3)


class KVPool:
    """Keys and values of one layer; follows the allocator's block numbers."""

    def __init__(self, key_states: Tensor, value_states: Tensor, block_size: int, num_blocks: int) -> None:
        self.keys, self.values = (Plane(states, block_size, num_blocks) for states in (key_states, value_states))

    @property
    def planes(self) -> tuple[Plane, Plane]:
        """Keys, values."""
        return self.keys, self.values

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks included."""
        return sum(plane.num_bytes for plane in self.planes)

    def write(self, key_states: Tensor, value_states: Tensor, table: BlockTable, start: int, stop: int) -> None:
        """Store the states of the columns `start` to `stop`: one launch where kernels run."""
        if runs_kernel(key_states):
            self.store(key_states, value_states, table.slots(start, stop, key_states.device).reshape(-1))
        else:
            self.keys.write(key_states, table, start, stop)
            self.values.write(value_states, table, start, stop)

    def store(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> None:
        """Store states [batch, num_kv_heads, tokens, head_dim] at `slots` [batch * tokens]."""
        if runs_kernel(key_states):
            key_states, value_states = (x if x.stride(-1) == 1 else x.contiguous() for x in (key_states, value_states))
            keys, values = self.planes
            store_kv(key_states, value_states, keys.codes, values.codes, slots, keys.scale, values.scale)
        else:
            self.keys.store(key_states, slots)
            self.values.store(value_states, slots)

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """See `Plane.resize`; one plane at a time, so that the transient is half a layer."""
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

    def to(self, device: torch.device) -> None:
        """See `Plane.to`."""
        for plane in self.planes:
            plane.to(device)


def _runs(src: list[int], dst: list[int]) -> list[tuple[int, int]]:
    """(first index, length) of the stretches in which both lists count up by one."""
    if not src:
        return []
    pairs = list(zip(src, dst, strict=True))
    cuts = [i + 1 for i, (p, q) in enumerate(pairwise(pairs)) if q[0] != p[0] + 1 or q[1] != p[1] + 1]
    bounds = [0, *cuts, len(pairs)]
    return [(a, b - a) for a, b in pairwise(bounds)]
