"""Facts about a model that are read from its code: whether it calls an attention interface, which masks it takes."""

import inspect
import re
import sys
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel


class ModelTraits(NamedTuple):
    """Facts about a modelling file."""

    calls_interface: bool  # its attention is chosen by `attn_implementation`
    selects_keys: bool  # it passes the attention a sparse selection of keys
    takes_boolean_masks: bool  # it passes masks on unread, as sdpa and flash attention require
    masks_windows: bool  # it masks what is before a window itself instead of leaving that to its cache


_CURRENT = ModelTraits(calls_interface=True, selects_keys=False, takes_boolean_masks=True, masks_windows=True)


@torch.compiler.assume_constant_result
def takes_boolean_masks(config_class: type[PreTrainedConfig]) -> bool:
    """Return `ModelTraits.takes_boolean_masks`, as a constant in compiled graphs."""
    return model_traits(config_class).takes_boolean_masks  # type: ignore[arg-type]


@cache
def model_traits(config_class: type[PreTrainedConfig]) -> ModelTraits:
    """Return the traits of the modelling file of `config_class`; an unknown file is assumed to be current."""
    module = _modelling_module(config_class)
    if module is None:
        return _CURRENT
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return _CURRENT
    # transformers' own heuristic (PreTrainedModel._can_set_attn_implementation), which is private to model classes.
    has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) is not None
    calls_interface = not has_attention or "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    base = [
        value for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]  # fmt: skip
    hands_on = any(getattr(value, f"_supports_{name}", False) for value in base for name in ("sdpa", "flash_attn"))
    selects_keys = re.search(r"scaling=self\.scaling,\n(?:\s+\w+=[\w.]+,\n)*\s+(?:block_)?indices=", source) is not None
    masks_windows = (
        re.search(r"create_(sliding_window|chunked)_causal_mask|create_masks_for_generate", source) is not None
    )
    return ModelTraits(calls_interface, selects_keys, calls_interface and (hands_on or not base), masks_windows)


def attention_obstacle(model: PreTrainedModel) -> str | None:
    """Say why our attention cannot be set on `model`, as the end of a sentence about it; None where it can."""
    traits = model_traits(type(model.config.get_text_config(decoder=True)))  # type: ignore[arg-type]
    if not traits.calls_interface:
        return "has its attention written into the model, so that no other can be chosen"
    if traits.selects_keys:
        return "attends to a sparse selection of keys, in which hf_kvopt's kernels have nothing to gain"
    return None


def _modelling_module(config_class: type[PreTrainedConfig]) -> ModuleType | None:
    name = config_class.__module__
    return sys.modules.get(name.replace("configuration_", "modeling_")) if "configuration_" in name else None
