"""Every model that the suite goes over, discovered from transformers at run time, and the few that it cannot."""

from typing import NamedTuple

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

# Model types with which transformers itself does not generate, each with its reason; a test keeps the list honest.
UNTESTABLE = {
    "blt": "DynamicCache cannot read its configuration, which has no num_hidden_layers",
    "gemma3n": "its image tower needs timm; gemma3n_text is the same decoder",
    "gemma4_assistant": "a draft model that reads the keys and values of its target and caches none",
    "gemma4_unified_assistant": "a draft model that reads the keys and values of its target and caches none",
}

_ENCODER_DECODERS = """
    BartForConditionalGeneration BlenderbotForConditionalGeneration BlenderbotSmallForConditionalGeneration
    LEDForConditionalGeneration LongT5ForConditionalGeneration M2M100ForConditionalGeneration MarianMTModel
    MBartForConditionalGeneration MT5ForConditionalGeneration MvpForConditionalGeneration
    NllbMoeForConditionalGeneration PegasusForConditionalGeneration PegasusXForConditionalGeneration
    PLBartForConditionalGeneration ProphetNetForConditionalGeneration
    SwitchTransformersForConditionalGeneration T5ForConditionalGeneration T5GemmaForConditionalGeneration
    T5Gemma2ForConditionalGeneration UMT5ForConditionalGeneration
"""
_MODALITIES = {
    **dict.fromkeys(_ENCODER_DECODERS.split(), "encoder"),
    "WhisperForConditionalGeneration": "speech",
    "LlavaForConditionalGeneration": "image",
    "Qwen2VLForConditionalGeneration": "image",
    "MllamaForConditionalGeneration": "image",
}


class Case(NamedTuple):
    """One model class; its name is the model type for causal language models and the class name for others."""

    name: str
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    modality: str  # "text", "codebooks", "encoder", "speech" or "image"


def causal_cases() -> list[Case]:
    return [_causal(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def _causal(model_type: str) -> Case:
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    modality = "codebooks" if model_type.startswith("musicgen") else "text"
    return Case(model_type, model_class, config_class, modality)


def other_cases() -> list[Case]:
    """Models that take more than a prompt: encoder-decoders, speech and images."""
    # Older versions lack the youngest classes.
    classes = [getattr(transformers, name) for name in _MODALITIES if hasattr(transformers, name)]
    return [Case(cls.__name__, cls, cls.config_class, _MODALITIES[cls.__name__]) for cls in classes]


def covered_cases() -> list[Case]:
    return [case for case in causal_cases() if case.name not in UNTESTABLE] + other_cases()
