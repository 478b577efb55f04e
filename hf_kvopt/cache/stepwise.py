"""Stepwise: while a draft is read, the layers of a model that hold states read it token by token.

    attention, MLP    root  x_1  x_2  x_3        all tokens at once
    states            root ─► x_1 ─► x_2 ─► x_3  a copy before each: the cache goes back to any of them (`cache.states`)

Each call is the one of plain decoding, so the states, and what is computed from them, are the same to the last bit. It
makes no difference how many of the tokens stay.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache

_lock = threading.Lock()


class TokenByToken:
    """Calls a module that holds states with one token at a time, where the cache that it is handed records them.

    It stands in the module's dict, as its `forward`, while a call decodes.
    """

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module = module
        self.inner = inner  # what stood in the instance's dict before, or None
        self.num_users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        forward = self.inner if self.inner is not None else type(module).forward.__get__(module)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, PagedCache)), None)
        if cache is None or not cache.records_states:
            return forward(*args, **kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        batch, num_tokens = first.shape[:2]
        layer_idx, state_idx = module.layer_idx + kwargs.get("cache_offset", 0), getattr(module, "conv_idx", None)
        outputs = []
        try:
            for token in range(num_tokens):
                cache.note_token(layer_idx, state_idx)
                cache.is_in_token = token > 0
                own_args, own_kwargs = (_token(given, token, batch, num_tokens) for given in (args, kwargs))
                outputs.append(forward(*own_args, **own_kwargs))
        finally:
            cache.is_in_token = False
        return outputs[0] if num_tokens == 1 else _joined(outputs)


@contextmanager
def stepwise(model: PreTrainedModel) -> Iterator[None]:
    """Let the layers of `model` that hold states read token by token into caches that record them."""
    modules = holders(model)
    with _lock:
        for module in modules:
            inner = module.__dict__.get("forward")
            if not isinstance(inner, TokenByToken):
                module.__dict__["forward"] = inner = TokenByToken(module, inner)
            inner.num_users += 1
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _remove(module)


def holders(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that write states to a cache."""
    return [module for module in model.modules() if _names(type(module)) & compat.STATE_WRITES]


def reads_by_token(model: PreTrainedModel) -> bool:
    """Return whether states of `model` can be recorded: no module that writes them writes keys and values as well."""
    found = holders(model)
    return (
        bool(found)
        and not any("update" in _names(type(module)) for module in found)
        and all(isinstance(getattr(module, "layer_idx", None), int) for module in found)
    )


def _remove(module: nn.Module) -> None:
    override = module.__dict__.get("forward")
    if not isinstance(override, TokenByToken):
        return
    override.num_users -= 1
    if override.num_users == 0:
        del module.__dict__["forward"]
        if override.inner is not None:
            module.__dict__["forward"] = override.inner


def _names(kind: type[nn.Module]) -> set[str]:
    """Return the attributes that the methods of a class of modules name."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if isinstance(code, CodeType):
                found |= set(code.co_names)
    return found


def _token(value: Any, token: int, batch: int, num_tokens: int) -> Any:
    """Return an argument, or all of them, for one of `num_tokens` tokens: what lies along the text is cut."""
    if isinstance(value, Tensor):
        is_along = value.dim() > 1 and value.shape[1] == num_tokens and value.shape[0] in (1, batch)
        return value[:, token : token + 1] if is_along else value
    if isinstance(value, dict):
        return {name: _token(part, token, batch, num_tokens) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_token(part, token, batch, num_tokens) for part in value)
    return value


def _joined(outputs: list[Any]) -> Any:
    """Return the outputs of single tokens as one."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    if isinstance(outputs[0], tuple):
        return tuple(_joined([output[i] for output in outputs]) for i in range(len(outputs[0])))
    return outputs[-1]
