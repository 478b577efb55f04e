"""Probe: whether the layers of a model that hold states go on from them where they read several tokens at once.

    read    x_1 ... x_5   then   x_6 x_7 x_8        each layer again with NaN for its states: if what it gives for
                                                    x_6 x_7 x_8 is a number all the same, it has forgotten them

Some models of transformers forget (those with Mamba 1, like Jamba and Zamba): they are made for prompts and for single
tokens, and give other tokens in a second turn, or where a prompt is read in chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.stepwise import holders
from hf_kvopt.errors import UnsupportedModel

_KNOWN, _NEW = 5, 3
_PARTS = ("conv_states", "recurrent_states")


def require_going_on(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where several tokens behind others are read as if nothing came before.

    Eight tokens are read, in evaluation mode.
    """
    if not compat.uses_standard_cache(type(model), model.config):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its past in a cache of its own: got a store of prefixes for it; use the "
            "model as it is"
        )
    asked = [_Asked(module) for module in holders(model)]
    with _in_place(asked), _evaluating(model):
        _read(model, asked)
    wrong = [type(one.module).__name__ for one in asked if one.forgets is not False]
    if wrong or not asked:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {type(model).__name__}: got {wrong[0] if wrong else 'no layer'}, which "
            "forgets its states where several tokens are read at once, so that a prompt cannot be gone on from; use "
            "PagedCache for this model"
        )


class _Asked:
    """Stands in a module's dict as its `forward`; no hook, with which it would be another model."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.inner = module, module.__dict__.get("forward")
        self.cache: DynamicCache | None = None  # given where the module is to be asked
        self.forgets: bool | None = None  # None: not known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inner if self.inner is not None else type(self.module).forward.__get__(self.module)
        layer_idx = getattr(self.module, "layer_idx", None)
        # Other threads may read other texts meanwhile.
        is_asked = self.cache is not None and any(value is self.cache for value in (*args, *kwargs.values()))
        if self.cache is not None and is_asked and layer_idx is not None:
            layer: Any = self.cache.layers[layer_idx + kwargs.get("cache_offset", 0)]
            kept = {part: dict(getattr(layer, part)) for part in _PARTS}
            answers = []
            for part in _PARTS:
                _put(layer, kept)
                if _poison(getattr(layer, part)):
                    answers.append(_is_number(forward(*args, **kwargs)))
            _put(layer, kept)
            self.forgets = any(answers)
        return forward(*args, **kwargs)


def _put(layer: Any, kept: dict[str, dict[int, Tensor | None]]) -> None:
    for part, states in kept.items():
        getattr(layer, part).update({i: None if one is None else one.clone() for i, one in states.items()})


def _poison(states: dict[int, Tensor | None]) -> bool:
    """Fill states with NaN; return whether there are any."""
    held = [one for one in states.values() if one is not None]
    for one in held:
        one.fill_(torch.nan)
    return bool(held)


def _is_number(output: Any) -> bool:
    parts = output if isinstance(output, tuple) else (output,)
    return not any(bool(part.isnan().any()) for part in parts if isinstance(part, Tensor))


@contextmanager
def _in_place(asked: list[_Asked]) -> Iterator[None]:
    try:
        for one in asked:
            one.module.__dict__["forward"] = one
        yield
    finally:
        for one in asked:
            del one.module.__dict__["forward"]
            if one.inner is not None:
                one.module.__dict__["forward"] = one.inner


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@torch.no_grad()
def _read(model: PreTrainedModel, asked: list[_Asked]) -> None:
    ids = torch.arange(1, _KNOWN + _NEW + 1, device=model.device)[None]
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, _KNOWN), (_KNOWN, _KNOWN + _NEW)):
        for one in asked:
            one.cache = cache if start else None
        positions = torch.arange(start, stop, device=ids.device)[None]
        keywords = {compat.cache_keyword(model): cache}
        model(input_ids=ids[:, start:stop], position_ids=positions, use_cache=True, **keywords)
