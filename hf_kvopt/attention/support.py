"""Obstacles of a model to our attention, and the kind of masks that it passes on."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt.compat import model_traits


@torch.compiler.assume_constant_result
def takes_boolean_masks(config_class: type[PreTrainedConfig]) -> bool:
    """Return `ModelTraits.takes_boolean_masks`, as a constant in compiled graphs."""
    return model_traits(config_class).takes_boolean_masks  # type: ignore[arg-type]


def attention_obstacle(model: PreTrainedModel) -> str | None:
    """Say why our attention cannot be set on `model`, as the end of a sentence about it; None where it can."""
    traits = model_traits(type(model.config.get_text_config(decoder=True)))  # type: ignore[arg-type]
    if not traits.calls_interface:
        return "has its attention written into the model, so that no other can be chosen"
    if traits.selects_keys:
        return "attends to a sparse selection of keys, in which hf_kvopt's kernels have nothing to gain"
    return None
