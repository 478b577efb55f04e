"""Every model that the suite goes over, discovered from transformers at run time, and the few that it cannot."""

from functools import cache
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
    """One model; named by its type among the causal language models, by its class among the others."""

    name: str
    modality: str  # "text", "codebooks", "encoder", "speech" or "image"

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Imported when asked for: one broken model must not keep the others from being collected."""
        return self.model_class.config_class if self.name in _MODALITIES else CONFIG_MAPPING[self.name]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """See `config_class`."""
        if self.name in _MODALITIES:
            return getattr(transformers, self.name)
        return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[self.name]]


def causal_cases() -> list[Case]:
    """Every registered causal language model."""
    return [
        Case(name, "codebooks" if name.startswith("musicgen") else "text") for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


@cache
def covered_cases() -> list[Case]:
    """All but the listed causal models, and models that take more than a prompt."""
    known = set(dir(transformers))  # older versions lack the youngest classes
    others = [Case(name, modality) for name, modality in _MODALITIES.items() if name in known]
    return [case for case in causal_cases() if case.name not in UNTESTABLE] + others
