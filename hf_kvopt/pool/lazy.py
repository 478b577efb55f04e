"""Tensors that exist only when somebody computes with them.

A `LazyTensor` has the shape, dtype and device of a dense tensor and no storage. Code that knows it takes its parts;
any other torch operation gets `dense()` instead, so it is right everywhere and fast where it is known. Mutating one
raises, because the write would be lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_kvopt.errors import CacheStateError

_PASS_THROUGH = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class LazyTensor(torch.Tensor):
    """Base of the wrapper subclasses; a subclass gives `dense()`, `rewrap()` and the two `__tensor_*flatten__`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def wrap(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """An instance without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)

    def dense(self) -> Tensor:
        """The contiguous tensor that this one stands for."""
        raise NotImplementedError

    def rewrap(self) -> "LazyTensor":
        """Another handle on the same parts."""
        raise NotImplementedError

    def before_fallback(self, op: str) -> None:
        """Called before `dense()` serves operation `op`."""

    def __setitem__(self, *_: Any) -> None:
        # As operations this is a view, which would be one of a copy, and a write into that.
        raise CacheStateError(
            f"items of a {type(self).__name__} cannot be assigned, as it has no storage of its own: the write would be "
            "lost; clone() it first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A dense copy: a tensor that somebody keeps must not follow the cache."""
        copied = self.dense().clone()
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _PASS_THROUGH:
            return args[0].rewrap()
        if func._schema.is_mutable and any(isinstance(written, LazyTensor) for written in _written(func, args, kwargs)):
            raise CacheStateError(
                f"{func} writes into a {cls.__name__}, which has no storage of its own: the write would be lost; "
                "clone() it first"
            )

        def materialise(lazy: LazyTensor) -> Tensor:
            lazy.before_fallback(str(func))
            return lazy.dense()

        args, kwargs = tree_map_only(LazyTensor, materialise, (args, kwargs or {}))
        return func(*args, **kwargs)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> list[Any]:
    """The arguments that `func` writes to, by its schema."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    positions = {a.name: i for i, a in enumerate(func._schema.arguments)}
    given = kwargs or {}
    return [args[positions[n]] if positions[n] < len(args) else given.get(n) for n in names]
