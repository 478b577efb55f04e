"""Registries of transformers in which attentions and masks have names, and its hooks that change nothing."""

from collections.abc import Callable
from typing import Any

from transformers import masking_utils, modeling_utils

from hf_kvopt.compat.names import find

ATTENTIONS = find(modeling_utils, "ALL_ATTENTION_FUNCTIONS")
MASKS = find(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS")
# Forward hooks of these modules hand on what they are given. One of a module that is not named here counts as a change.
READING_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention and the mask that it takes under one name, unless that is taken.

    Raises:
        UnsupportedModel: this transformers has no such registry.
    """
    for registry, function in ((ATTENTIONS, attention), (MASKS, mask)):
        if getattr(registry, "is_missing", False):
            registry()
        if name not in registry:
            registry.register(name, function)


def attention_functions(name: str) -> tuple[Any, Any]:
    """Return the attention and the mask that are registered under `name` now, None for what is not."""
    return ATTENTIONS.get(name), MASKS.get(name)
