"""Sampled values of many tensors, read in few operations: which of them were written to without a trace.

From every tensor a line of values is read, from its first element towards its last through all dimensions at once, and
where that line is all zero one value that is not. So a write that scales a tensor, or moves all of it as an optimizer
does, changes what is read; a write to a few elements may not.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_LINE = 16  # values of a tensor of two or more dimensions
_VECTOR = 64  # of one with a single dimension: norms, biases, rotary frequencies
# Where a tensor begins, how often torch saw it written to, and the number of its layout.
TensorKey = tuple[int, int, int]


class _TensorLayout(NamedTuple):
    """Layout that tensors of one dtype, device, shape and stride have in common."""

    number: int
    group: tuple[torch.device, torch.dtype] | None  # what is read together; None where nothing can be read
    size: tuple[int, ...]  # of the line
    stride: tuple[int, ...]


class Samples:
    """Reads samples of the tensors of one model. Holds no tensor."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], _TensorLayout] = {}
        self._nonzero: dict[TensorKey, int | None] = {}  # where tensors whose line is zero hold another value

    @torch.inference_mode()
    def read(self, tensors: Iterable[Tensor]) -> list[bytes]:
        """Return where the tensors lie and what was sampled of them; a device is waited for once a dtype."""
        places: list[int] = []
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[TensorKey, Tensor, Tensor]]] = {}
        for tensor in parts_of(tensors):
            layout = self._layout_of(tensor)
            try:
                version = tensor._version
            except RuntimeError:  # made under inference mode
                version = 0
            place = 0 if layout.group is None else tensor.data_ptr(), version, layout.number
            places += place
            if layout.group is not None:
                values = tensor if tensor.dtype.itemsize > 1 else _as_integers(tensor)
                line = values.as_strided(layout.size, layout.stride)
                groups.setdefault(layout.group, []).append((place, tensor, line))
        found = [array("Q", places).tobytes()]
        known, self._nonzero = self._nonzero, {}
        for group in groups.values():
            values = torch.cat([line for _, _, line in group]).cpu()
            found.append(_bytes_of(values))
            for i in _zero_lines(values, [line.shape[0] for _, _, line in group]):
                place, tensor, _ = group[i]
                self._nonzero[place] = offset = known[place] if place in known else _find_nonzero(tensor)
                if offset is not None:
                    found.append(_bytes_of(_as_integers(tensor).as_strided((1,), (1,), offset).cpu()))
        return found

    def _layout_of(self, tensor: Tensor) -> _TensorLayout:
        is_dense = tensor.layout is torch.strided
        key = tensor.dtype, tensor.device, tensor.shape, tensor.stride() if is_dense else None
        layout = self._layouts.get(key)
        if layout is None:
            is_readable = is_dense and not tensor.is_meta and not tensor.is_quantized and tensor.numel() > 0
            group = (tensor.device, tensor.dtype) if is_readable else None
            line = _line(tensor.shape, tensor.stride()) if is_readable else ((), ())
            layout = self._layouts[key] = _TensorLayout(len(self._layouts), group, *line)
        return layout


def parts_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that have a memory of their own: those given, or the parts of those that wrap others."""
    for tensor in tensors:
        if type(tensor) not in (Parameter, Tensor) and is_traceable_wrapper_subclass(tensor):
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            yield from parts_of(part for part in parts if isinstance(part, Tensor))
        else:
            yield tensor


def _line(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of a view of values from the first one on, spread over all dimensions that are long enough."""
    count = min(_VECTOR if len(shape) == 1 else _LINE, max(shape, default=1))
    steps = zip(shape, stride, strict=True)
    return (count,), (sum((size - 1) // max(1, count - 1) * step for size, step in steps),)


def _as_integers(tensor: Tensor) -> Tensor:
    """Values of one byte as integers: torch cannot copy all their types."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _bytes_of(values: Tensor) -> bytes:
    return bytes(values.view(torch.uint8).numpy())


def _zero_lines(values: Tensor, counts: Sequence[int]) -> list[int]:
    """Which lines, of so many values each and one behind the other in `values`, are zero throughout."""
    starts = np.cumsum([0, *counts[:-1]])
    is_set = np.logical_or.reduceat(values.bool().numpy(), starts)
    return np.flatnonzero(~is_set).tolist()


def _find_nonzero(tensor: Tensor) -> int | None:
    """Return where in its storage a tensor holds a value that is not zero; reads all of it."""
    is_set = _as_integers(tensor).bool().reshape(-1).byte()
    position = int(is_set.argmax())
    if not is_set[position]:
        return None
    place = np.unravel_index(position, tensor.shape)
    return int(tensor.storage_offset()) + int(np.dot(place, tensor.stride()))
