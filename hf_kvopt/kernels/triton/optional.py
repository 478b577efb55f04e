"""Triton where it is installed, a stand-in where it is not: the references of this package need torch only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Missing:
        """Answers every attribute, so that kernel files import; decorates without change, cannot launch."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, value: Any) -> Any:
            return value

        def jit(self, fn: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
            return (lambda kernel: kernel) if fn is None else fn

    triton = tl = TensorDescriptor = _Missing()

# Read once: triton decides at decoration, when the kernel files are imported.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["HAS_TRITON", "INTERPRET", "TensorDescriptor", "tl", "triton"]
