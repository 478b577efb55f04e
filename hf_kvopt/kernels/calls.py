"""What a backend is asked to do, as frozen values: the planes of a pool, and one write to them.

`kernels.store` has the ordered list of backends that write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from hf_kvopt.kernels.cpu.place import Place
from hf_kvopt.quant import Format


class StoredPlane(Protocol):
    """The keys, or the values, of one layer as they lie in blocks."""

    @property
    def codes(self) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, width]."""
        ...

    @property
    def scale(self) -> Tensor | None:
        """[num_blocks, block_size, num_kv_heads, *scale_shape]; None for native storage."""
        ...

    @property
    def format(self) -> Format:
        """How a vector of channels is stored."""
        ...

    @property
    def rotates(self) -> bool:
        """Whether vectors are rotated before they are stored."""
        ...

    @property
    def place(self) -> Place | None:
        """Where the tensors lie, for the compiled kernels of a CPU; None where those cannot read or write them."""
        ...

    @property
    def tensors(self) -> list[Tensor]:
        """The codes and, where there are any, the scales."""
        ...


class Stored(NamedTuple):
    """A plane made of its tensors, for a pool that nobody holds as an object."""

    codes: Tensor
    scale: Tensor | None
    format: Format
    rotates: bool = False
    place: Place | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The codes and, where there are any, the scales."""
        return [self.codes] if self.scale is None else [self.codes, self.scale]


class PlaneWrite(NamedTuple):
    """New states of one plane."""

    plane: StoredPlane
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
