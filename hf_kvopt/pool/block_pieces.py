"""Blocks of one layer as tensors that can leave the pool: for files, and for the tiers below the device.

    "layer 0 keys"         [n, block_size, num_kv_heads, width]       codes
    "layer 0 keys scale"   [n, block_size, num_kv_heads]              where the format has scales
    "layer 0 keys centre"  [n, num_kv_heads, head_dim]                what was taken from coarse keys before
    "layer 0 keys token", "... mean"                                  parameters of sealed blocks
    "layer 0 keys exact"   [m, block_size, num_kv_heads, head_dim]    blocks that are kept as they were computed, too

A piece refers to the pool's tensor and says which blocks of it are meant. So the bytes can be read and written while
nobody holds the lock; a pool that was resized meanwhile has other tensors, which `is_current` notices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_kvopt.pool.plane import Plane
from hf_kvopt.pool.sealed import SealedPlane
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.storage import KVPool


class Piece(NamedTuple):
    """Some blocks of one tensor of a pool."""

    name: str
    source: Tensor  # blocks, or exact places, along its first dimension
    places: Tensor  # [n] int64, on the device of `source`

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block."""
        return math.prod(self.source.shape[1:]) * self.source.itemsize

    def read(self) -> Tensor:  # [n, bytes_per_block] uint8
        """Return a copy of the blocks as bytes, on their device."""
        if self.source.device.type == "cpu":
            # By numpy: many small copies by torch's threads cost more than they move where cores are busy.
            blocks = np.ascontiguousarray(self._bytes.numpy()[self.places.numpy()])
            return torch.from_numpy(blocks.reshape(len(self.places), self.bytes_per_block))
        return self._bytes[self.places].reshape(len(self.places), self.bytes_per_block)

    def write(
        self,
        blocks: Tensor,  # [n, bytes_per_block] uint8
    ) -> None:
        """Store what `read` returned."""
        held = self._bytes
        shape = (len(self.places), *held.shape[1:])
        if held.device.type == "cpu":
            held.numpy()[self.places.numpy()] = blocks.numpy().reshape(shape)
        else:
            held[self.places] = blocks.to(held.device).reshape(shape)

    def typed(self, blocks: Tensor) -> Tensor:
        """Return what `read` returned in shape and dtype of the pool; float8 stays bytes, which files can hold."""
        is_float8 = self.source.dtype.is_floating_point and self.source.itemsize == 1
        flat = blocks.contiguous().view(-1).view(torch.uint8 if is_float8 else self.source.dtype)
        return flat.view(len(self.places), *self.source.shape[1:])

    @property
    def _bytes(self) -> Tensor:
        """The whole tensor as bytes, by reference."""
        source = self.source if self.source.stride(-1) == 1 else self.source.unsqueeze(-1)
        return source.view(torch.uint8)


def pieces_of(
    layer_idx: int,
    pool: KVPool | SealedPool,
    numbers: Sequence[int],
    exact: Sequence[int] = (),  # places in the exact storage
) -> list[Piece]:
    """Return the pieces of blocks `numbers` of one layer; whoever calls holds the allocator's lock."""
    found = []
    planes: tuple[Plane | SealedPlane, ...] = pool.planes
    for name, plane in zip(("keys", "values"), planes, strict=True):
        prefix = f"layer {layer_idx} {name}"
        index = torch.tensor(list(numbers), dtype=torch.long, device=plane.tensors[0].device)
        found += [Piece(f"{prefix}{part}", tensor, index) for part, tensor in _parts(plane)]
        if isinstance(plane, SealedPlane):
            places = torch.tensor(list(exact), dtype=torch.long, device=plane.exact.device)
            found.append(Piece(f"{prefix} exact", plane.exact, places))
        elif plane.centres is not None:
            # Copied now, because centres are renumbered; small, and written back by `put_centres`.
            centres = plane.centres.of_blocks(list(numbers))
            found.append(Piece(f"{prefix} centre", centres, torch.arange(len(centres), device=centres.device)))
    return found


def is_centre(piece: Piece) -> bool:
    """Tell whether a piece is written by `put_centres` alone."""
    return piece.name.endswith(" centre")


def put_centres(
    layer_idx: int, pool: KVPool | SealedPool, numbers: Sequence[int], tensors: Mapping[str, Tensor]
) -> None:
    """Let blocks `numbers` have the centres of "layer ... centre" in `tensors`, where the format takes any."""
    planes: tuple[Plane | SealedPlane, ...] = pool.planes
    for name, plane in zip(("keys", "values"), planes, strict=True):
        if isinstance(plane, Plane) and plane.centres is not None:
            plane.centres.put_blocks(list(numbers), tensors[f"layer {layer_idx} {name} centre"])


def is_current(before: Sequence[Piece], now: Sequence[Piece]) -> bool:
    """Tell whether the pools still have the tensors that `before` refers to."""
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(a.source is b.source or is_centre(a) for a, b in pairs)


def describe(plane: Plane | SealedPlane) -> dict[str, Any]:
    """Return what says which states a plane holds: heads, size of a head and dtype."""
    return {"num_heads": plane.num_heads, "dim": plane.dim, "dtype": str(plane.dtype).removeprefix("torch.")}


def states_like(planes: Sequence[Mapping[str, Any]], device: torch.device) -> list[Tensor]:
    """Return states [1, num_kv_heads, 0, head_dim] of keys and values as `describe` told them."""
    return [
        torch.empty(1, plane["num_heads"], 0, plane["dim"], dtype=getattr(torch, plane["dtype"]), device=device)
        for plane in planes
    ]


def _parts(plane: Plane | SealedPlane) -> list[tuple[str, Tensor]]:
    """Return the tensors of a plane's blocks, by the ending of their names."""
    if isinstance(plane, SealedPlane):
        return list(zip(("", " token", " mean"), plane.stored, strict=False))
    return list(zip(("", " scale"), plane.tensors, strict=False))
