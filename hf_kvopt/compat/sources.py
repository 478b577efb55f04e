"""Facts about a model that are read from its code: whether it calls an attention interface, which masks it takes."""

import inspect
import re
import sys
from functools import cache
from types import ModuleType
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel


class ModelTraits(NamedTuple):
    """Facts about a modelling file."""

    calls_interface: bool  # its attention is chosen by `attn_implementation`
    selects_keys: bool  # it passes the attention a sparse selection of keys
    takes_boolean_masks: bool  # it passes masks on unread, as sdpa and flash attention require
    masks_windows: bool  # it masks what is before a window itself instead of leaving that to its cache


_CURRENT = ModelTraits(calls_interface=True, selects_keys=False, takes_boolean_masks=True, masks_windows=True)


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
    # transformers' own heuristic, which `can_choose_attention` asks of a model class.
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


def _modelling_module(config_class: type[PreTrainedConfig]) -> ModuleType | None:
    name = config_class.__module__
    return sys.modules.get(name.replace("configuration_", "modeling_")) if "configuration_" in name else None
