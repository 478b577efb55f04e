"""Storage of one layer whose full blocks are sealed; see `quant.sealed_formats` for what a block then holds.

    codes  [num_blocks, block_size, num_kv_heads, width] uint8            one for every block of the allocator
    token  [num_blocks, block_size, num_kv_heads, groups] float16         s
    mean   [num_blocks, num_kv_heads, head_dim] float16                   keys alone
    exact  [places, block_size, num_kv_heads, head_dim] model's dtype     a few blocks of each row, see `pool.tail`

A block is sealed once, when it is full, from its own tokens: it depends neither on other blocks, nor on how the text
came in. Until then, and while it is among a row's newest, it is exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.calls import KVSpec
from hf_kvopt.kernels.cpu.seal import can_seal, seal_blocks
from hf_kvopt.kernels.cpu.sealed_place import SealedPlace, sealed_place
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.sealed_kv import BothForms
from hf_kvopt.kernels.sealed_view import SealedView
from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.slots import shared_runs, writable
from hf_kvopt.quant import NATIVE, Format
from hf_kvopt.quant.sealed import SealedBlocks, seal, unseal
from hf_kvopt.quant.sealed_formats import PARAMETER_DTYPE, BlockCodec

# Blocks that are sealed in one go: what is computed beside them stays small.
_AT_ONCE = 64


class SealedPlane:
    """The keys or the values of one layer.

    Args:
        states: a tensor [batch, num_kv_heads, any, head_dim] as the model makes them: gives shape, dtype and device.
        allocator: whose blocks and exact places these follow.
        codec: how full blocks are stored.

    Raises:
        ValueError: the codec cannot pack this head_dim.
    """

    format: Format = NATIVE  # of what is exact
    rotates = False  # nor are exact keys rotated
    centres = row_centres = place = None  # what planes of single tokens have

    def __init__(self, states: Tensor, allocator: BlockAllocator, codec: BlockCodec) -> None:
        assert allocator.tails is not None
        self.num_heads, self.dim = states.shape[1], states.shape[-1]
        self.dtype, self.home = states.dtype, states.device
        self.block_size, self.codec = allocator.block_size, codec
        self._place: SealedPlace | None = None  # where the tensors lie, once that was asked
        self._hold(
            self._blocks(allocator.num_blocks, states.device), self._places(allocator.tails.capacity, states.device)
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_place": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold([writable(x) for x in self.stored], writable(self.exact))

    @property
    def num_blocks(self) -> int:
        """Blocks that memory is held for."""
        return self.stored[0].shape[0]

    @property
    def sealed_place(self) -> SealedPlace | None:
        """Return where the tensors lie, for the compiled kernel of a CPU; None where it cannot read them."""
        if self._place is None:
            self._place = sealed_place(self.exact, self.stored, self.codec)
        return self._place

    @property
    def tensors(self) -> list[Tensor]:
        """All that holds memory: codes, token, mean where there is one, and exact."""
        return [*self.stored, self.exact]

    @property
    def tail_bytes(self) -> int:
        """Bytes of exact blocks, free places included."""
        return self.exact.untyped_storage().nbytes()

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks and exact ones included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def no_tokens(self, batch: int) -> Tensor:
        """Return [batch, num_kv_heads, 0, head_dim]: states such as this plane holds, but none."""
        return torch.empty(batch, self.num_heads, 0, self.dim, dtype=self.dtype, device=self.home)

    def write(self, states: Tensor, table: BlockTable, start: int, stop: int) -> None:
        """Store states [batch, num_kv_heads, stop - start, head_dim] of these columns, and seal what becomes full."""
        slots = tail.exact_slots(table, start, stop, states.device).reshape(-1)
        tokens = states.transpose(1, 2).flatten(0, 1)
        if stop - start > 1 or table.is_ragged:
            kept = slots >= 0
            slots, tokens = slots[kept], tokens[kept]
        self.exact.view(-1, self.num_heads, self.dim).index_put_((slots,), tokens)
        full = tail.completed(table, start, stop)
        for i in range(0, len(full), _AT_ONCE):
            self._seal_full(full[i : i + _AT_ONCE], states, table, start)

    def takes(self, x: Tensor) -> bool:
        """Return whether states come from a layer of equal geometry and dtype, on the device of this one."""
        return (x.shape[1], x.shape[3], x.dtype, x.device) == (self.num_heads, self.dim, self.dtype, self.home)

    def both_forms(self, new: Tensor | None = None) -> BothForms:
        """Return all that is stored, and the states of the last tokens, as kernels take them."""
        codes, token, *mean = self.stored
        return BothForms(codes, token, mean[0] if mean else None, self.exact, self.codec, new)

    def seal_places(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Seal `blocks` anew from their exact places."""
        self._seal(blocks, [self.exact[place].transpose(0, 1) for place in places])

    def put(self, blocks: Sequence[int], sealed: SealedBlocks) -> None:
        """Store sealed blocks under these numbers."""
        index = torch.tensor(blocks, device=self.exact.device)
        codes, token, *mean = self.stored
        codes[index], token[index] = sealed.codes.transpose(1, 2), sealed.token.transpose(1, 2)
        if mean:
            assert sealed.mean is not None
            mean[0][index] = sealed.mean

    def unsealed(
        self,
        blocks: Tensor,  # [n] block numbers
    ) -> Tensor:
        """Return what stored blocks stand for, [n, num_kv_heads, block_size, head_dim] float32."""
        codes, token, *mean = self.stored
        picked = codes[blocks].transpose(1, 2), token[blocks].transpose(1, 2), mean[0][blocks] if mean else None
        return unseal(SealedBlocks(*picked), self.codec, self.dim)

    def read(self, table: BlockTable, kv_len: int, skip: int = 0) -> Tensor:
        """Return [batch, num_kv_heads, kv_len, head_dim] as a query at the last token reads it, from the column
        `skip` behind the table's base on; a column without a token reads as some other, finite one."""
        rows = [self._row(table, i, kv_len, skip) for i in range(len(table.rows))]
        return torch.cat(rows) if len(rows) != 1 else rows[0]

    def read_blocks(self, table: BlockTable, rows: Sequence[int], first: int, stop: int, tile: int) -> Tensor:
        """Blocks `first` to `stop` of some rows as queries of block `tile` read them.

        Returns:
            [len(rows), num_kv_heads, (stop - first) * block_size, head_dim] in the model's dtype; what is to be exact
            and lies in no place is undefined.
        """
        base, size = table.first_block, self.block_size
        out = torch.zeros(
            len(rows), self.num_heads, (stop - first) * size, self.dim, dtype=self.dtype, device=self.exact.device
        )
        numbers = table.rows_on(self.exact.device)[0][list(rows), first - base : stop - base].long()
        low, high = max(1, first), min(stop, max(first, tile - 1))  # sealed
        if low < high:
            picked = self.unsealed(numbers[:, low - first : high - first].reshape(-1))
            picked = picked.unflatten(0, (len(rows), -1)).transpose(1, 2).flatten(2, 3)
            out[:, :, (low - first) * size : (high - first) * size] = picked
        places = table.exact_table(self.exact.device)[list(rows), first - base : stop - base].long()
        for a, b in ((first, min(stop, low)), (max(low, high), stop)):
            if a < b:
                picked = self.exact[places[:, a - first : b - first]]  # [rows, blocks, block_size, heads, dim]
                out[:, :, (a - first) * size : (b - first) * size] = picked.flatten(1, 2).transpose(1, 2)
        return out

    def view(
        self, table: BlockTable, kv_len: int, skip: int, states: Tensor | None = None, arrived: Tensor | None = None
    ) -> SealedView:
        """`kv_len` tokens of every row, `skip` tokens in, by reference; `arrived` are the states of the last ones."""
        spec = KVSpec((len(table.rows), self.num_heads, kv_len, self.dim), self.dtype, self.format.name)
        view = SealedView.of(self._as_it_lies(), table, spec, skip, states, arrived)
        view.source = self
        return view

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Move to `num_blocks` blocks, block `src[i]` becoming `dst[i]`; exact places stay."""
        moved = self._blocks(num_blocks, self.exact.device)
        for before, after in zip(self.stored, moved, strict=True):
            for first, length in shared_runs(src, dst):
                a, b = src[first], dst[first]
                after[b : b + length].copy_(before[a : a + length])
        self._hold(moved, self.exact)  # only now: another thread may be reading

    def resize_tails(self, capacity: int) -> None:
        """Make room for `capacity` exact blocks; those that there are stay where they are."""
        exact = self._places(capacity, self.exact.device)
        exact[: len(self.exact)].copy_(self.exact)
        self._hold(self.stored, exact)

    def copy_blocks(self, src: list[int], dst: list[int], places: Sequence[tuple[int, int]]) -> None:
        """Copy block `src[i]` to `dst[i]`, and exact places (from, to)."""
        for tensor in self.stored:
            for a, b in zip(src, dst, strict=True):
                tensor[b].copy_(tensor[a])
        for a, b in places:
            self.exact[b].copy_(self.exact[a])

    def to(self, device: torch.device) -> None:
        """Move the bytes, in place of the object."""
        with torch.inference_mode(False):
            stored = [x.to(device, non_blocking=True) for x in self.stored]
            self._hold(stored, self.exact.to(device, non_blocking=True))

    def _as_it_lies(self) -> "SealedPlane":
        """A plane over the same tensors, which stays where it is when this one moves."""
        twin = object.__new__(SealedPlane)
        twin.__dict__.update(self.__dict__, _place=self.sealed_place)
        return twin

    def _hold(self, stored: list[Tensor], exact: Tensor) -> None:
        """Take these tensors for storage."""
        self.stored, self.exact, self._place = stored, exact, None

    def _seal(
        self,
        blocks: Sequence[int],
        sources: Sequence[Tensor],  # for each block [num_kv_heads, block_size, head_dim]
    ) -> None:
        """Store the sealed form of blocks."""
        place = self.sealed_place
        if place is not None and can_seal(place, sources):
            seal_blocks(place, blocks, sources)
        else:
            self.put(blocks, seal(torch.stack(list(sources)), self.codec))

    def _seal_full(self, full: Sequence[tuple[int, int]], states: Tensor, table: BlockTable, start: int) -> None:
        """Seal the blocks (row, block of the row): from their places, else from `states`, which begin at `start`."""
        assert table.allocator.tails is not None
        places, base = table.allocator.tails.places, table.first_block
        numbers, parts = [], []
        for row, block in full:
            number = table.rows[row][block - base]
            numbers.append(number)
            if number in places:
                parts.append(self.exact[places[number]].transpose(0, 1))
            else:
                first = block * self.block_size - (start - table.origin - table.lags[row])
                parts.append(states[row, :, first : first + self.block_size])
        self._seal(numbers, parts)

    def _row(self, table: BlockTable, row: int, kv_len: int, skip: int) -> Tensor:
        """Return [1, num_kv_heads, kv_len, head_dim] of one row; see `read`."""
        size, length = self.block_size, max(0, table.lengths[row] - table.origin)
        stop, first = -(-length // size), table.first_block
        if stop <= first:
            return self.exact.new_zeros(1, self.num_heads, kv_len, self.dim)
        held = self.read_blocks(table, [row], first, stop, max(0, length - 1) // size)
        # Column c of those asked for is token skip + c - lag of what the row holds.
        tokens = torch.arange(skip, skip + kv_len, device=held.device) - table.lags[row]
        return held.index_select(2, tokens.clamp(0, length - 1 - (table.base - table.origin)))

    def _blocks(self, num_blocks: int, device: torch.device) -> list[Tensor]:
        """Zeros for codes, token and mean."""
        made = [self._zeros(num_blocks, self.codec.width(self.dim), torch.uint8, device)]
        made.append(self._zeros(num_blocks, self.codec.num_groups(self.dim), PARAMETER_DTYPE, device))
        if self.codec.centred:
            with torch.inference_mode(False):
                made.append(torch.zeros(num_blocks, self.num_heads, self.dim, dtype=PARAMETER_DTYPE, device=device))
        return made

    def _places(self, capacity: int, device: torch.device) -> Tensor:
        return self._zeros(capacity, self.dim, self.dtype, device)

    def _zeros(self, num_blocks: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make [num_blocks, block_size, num_kv_heads, width]; on a CPU the heads are outermost, see `Plane`."""
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if runs_kernel(torch.empty(0, device=device)):
                return torch.zeros((num_blocks, self.block_size, self.num_heads, width), dtype=dtype, device=device)
            shape = (self.num_heads, num_blocks, self.block_size, width)
            return torch.zeros(shape, dtype=dtype, device=device).movedim(0, 2)
