"""Pretend that CPU tensors lie on a card: every device branch is taken, and what a card would pay for is counted.

    syncs     a value of a tensor is read by the host: int(), bool(), item(), tolist(), nonzero()
    copies    numbers of the host become a tensor on the device

Kernels run by the interpreter, as everywhere in this folder. Only what this library does by itself is counted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kvopt.kernels import devices

_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Costs(TorchDispatchMode):
    """Counts, by place, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READS:
            self.note(self.syncs)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def note(places: list[str]) -> None:
        """Add the place in this library from which a call comes, if it does."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith(("triton", "transformers", "numpy")):
                return
            if name.startswith("hf_kvopt"):
                places.append(f"{name}:{frame.f_lineno}")
                return
            frame = frame.f_back  # type: ignore[assignment]


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Costs]:
    """Take every device branch, and count what it costs."""
    costs = Costs()

    def counted(function: Any, places: list[str]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            costs.note(places)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(devices, "is_on_host", lambda tensor: False)
        patch.setattr(torch.Tensor, "tolist", counted(torch.Tensor.tolist, costs.syncs))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, counted(getattr(torch, name), costs.copies))
        with costs:
            yield costs
