"""Values as text, for telling whether two are equal: written out, or numbered where that cannot be."""

import functools
import itertools
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SCALARS = (int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))
CONTAINERS = (dict, list, tuple, set, frozenset)
Reference = Callable[[], Any]


class Numbers:
    """Gives every object a number; one that was freed takes its number with it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Reference, int]] = {}
        self._fresh = itertools.count()
        self._limit = 1024

    def fresh(self) -> int:
        """Return a number that nothing has."""
        return next(self._fresh)

    def of(self, thing: object) -> int:
        """Return the number of `thing`."""
        known = self._known.get(id(thing))
        if known is not None and known[0]() is thing:
            return known[1]
        if len(self._known) > self._limit:
            self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
            self._limit = 2 * len(self._known) + 1024
        number = self.fresh()
        self._known[id(thing)] = reference(thing), number
        return number


class Found:
    """Tensors, and modules and configs, that were come across in attributes."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.owners: list[Any] = []


def spell(value: Any, name_of: Callable[[Any], object], found: Found) -> str:
    """Write a value out; what cannot be written out is named, and `found` where it can be looked into."""
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, dict):
        pairs = [f"{spell(key, name_of, found)}:{spell(each, name_of, found)}" for key, each in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([spell(each, name_of, found) for each in value]) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(spell(each, name_of, found) for each in value)) + "}"
    if isinstance(value, Tensor):
        if not value.is_meta:  # else it stands for one that is elsewhere
            found.tensors.append(value)
        return "tensor"
    if isinstance(value, nn.Module | PreTrainedConfig):
        found.owners.append(value)
    return f"#{name_of(value)}"


def reference(thing: Any) -> Reference:
    """Return what gives `thing` back while it lives; what cannot be referred to weakly is held."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return functools.partial(_same, thing)


def kind_of(thing: Any) -> str:
    """Return the full name of a function or class; of anything else, that of its class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _same(thing: Any) -> Any:
    return thing
