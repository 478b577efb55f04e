"""The keys, or the values, of one layer in blocks: the tensors, how they are encoded, and what reads and moves them."""

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.blocks import row_views, strided
from hf_kvopt.kernels.calls import KVSpec, KVView, PlaneWrite, Stored, restored
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.devices import require_format, runs_kernel
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.centres import Centres
from hf_kvopt.pool.fixed_rows import FixedCentres
from hf_kvopt.pool.slots import shared_runs, writable
from hf_kvopt.quant import (
    NATIVE,
    NO_GUARD,
    SCALE_DTYPE,
    Format,
    Guard,
    Quantized,
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
        """Return [num_blocks, block_size, num_kv_heads, width]."""
        return self.stored.codes

    @property
    def scale(self) -> Tensor | None:
        """Return [num_blocks, block_size, num_kv_heads, *scale_shape]; None for native storage."""
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
        """Return [batch, num_kv_heads, 0, head_dim]: states such as this plane holds, but none."""
        return torch.empty(batch, self.num_heads, 0, self.dim, dtype=self.dtype, device=self.home)

    def write_of(self, states: Tensor, centre: Tensor | None = None) -> PlaneWrite:
        """Return a write of states [batch, num_kv_heads, tokens, head_dim], less centre [batch, heads, dim]."""
        return PlaneWrite(self.stored, self.format, states, centre)

    def centre_of(self, table: BlockTable) -> Tensor | None:
        """Return [batch, num_kv_heads, head_dim] that was taken from each row of `table`; None where nothing was."""
        return None if self.centres is None else self.centres.of_rows(table)

    def read(self, table: BlockTable, kv_len: int, skip: int = 0) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, head_dim], from the column `skip` behind the table's base on.

        A view of native storage where rows lie evenly in the pool, else a copy; a column without a token reads as some
        other, finite one.
        """
        return self.view(table, kv_len, skip).dense()

    def read_even(self, batch: int, tokens: int, centre: Tensor | None) -> Tensor:
        """Return [batch, num_kv_heads, tokens, head_dim] of rows that lie one behind the other from slot 0 on."""
        parts = [strided(x, 0, tokens, batch, tokens) for x in self.tensors]
        spec = KVSpec((batch, self.num_heads, tokens, self.dim), self.dtype, self.format.name, self.rotates)
        return restored(Quantized(*parts), spec, centre)

    def view(self, table: BlockTable, kv_len: int, skip: int = 0, states: Tensor | None = None) -> KVView:
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

    def copy_blocks(self, src: Tensor, dst: Tensor) -> None:
        """Copy the blocks `src` [n] to the blocks `dst`, scales included: one copy for each tensor."""
        for held in self.tensors:
            # index_put knows no float8: its bytes are moved.
            blocks = held.view(torch.uint8) if held.element_size() == 1 else held
            blocks[dst] = blocks[src]

    def move_slots(self, src: Tensor, dst: Tensor) -> None:
        """Copy the tokens in slots `src` [n] to slots `dst`."""
        for held in (self.codes, self.scale):
            if held is not None:
                # index_put knows no float8: its bytes are moved.
                flat = (held.view(torch.uint8) if held.element_size() == 1 else held).flatten(0, 1)
                flat[dst] = flat[src]

    def move_heads(self, src: Tensor, dst: Tensor) -> None:
        """Copy for each KV head the tokens in its slots `src` [num_kv_heads, n] to the slots `dst` [n]."""
        heads = torch.arange(len(src), device=src.device)
        for held in (self.codes, self.scale):
            if held is not None:
                flat = (held.view(torch.uint8) if held.element_size() == 1 else held).flatten(0, 1)
                flat[dst] = flat[src.T, heads]

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
        self.stored = Stored(codes, scale, self.rotates, address_of(codes, scale))

    def _blocks(self, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Zeros for codes and scales."""
        width = self.format.packed_dim(self.dim)
        codes = self._zeros(num_blocks, (width,), self.format.code_dtype or self.dtype, device)
        if not self.format.has_scale:
            return codes, None
        return codes, self._zeros(num_blocks, self.format.scale_shape, SCALE_DTYPE, device)

    def _zeros(self, num_blocks: int, tail: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [num_blocks, block_size, num_kv_heads, *tail]."""
        # A tensor made in inference mode could not be written outside of it. Zeros, because a masked slot is still
        # multiplied by its zero probability, and zero times an old NaN is NaN.
        with torch.inference_mode(False):
            if not self.heads_first:
                return torch.zeros((num_blocks, self.block_size, self.num_heads, *tail), dtype=dtype, device=device)
            # The heads outermost in memory: a core then streams one head's keys without gaps
            # (0.75x time at 8 KV heads of 128, where tokens would lie 4 KiB apart and share their L1 sets).
            shape = (self.num_heads, num_blocks, self.block_size, *tail)
            return torch.zeros(shape, dtype=dtype, device=device).movedim(0, 2)
