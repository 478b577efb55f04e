"""Tiny random models of every type, in float32, whose tokens depend on what attention sees.

Weights are drawn wide enough that the next token is decided by margins far above float32 noise. The same case always
gives the same weights, so two models that differ in their attention can be compared token by token.
"""

import math
import zlib

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.cases import Case
from tests.models.overrides import OVERRIDES, PARTS, SALTS
from tests.models.shrink import PAD_TOKEN, START_TOKEN, shrink

NEW_TOKENS = 14
_GAIN = 1.5


def tiny_config(case: Case) -> PreTrainedConfig:
    """Build the shrunken configuration that the model class takes: of a composite one, the part it is made for."""
    kind = case.config_class
    # transformers 5.19 has no default for configurations that are made of others.
    parts = PARTS[case.name] if getattr(kind, "has_no_defaults_at_init", False) else {}
    default = kind(**{name: CONFIG_MAPPING[part]() for name, part in parts.items()})
    config = shrink(default, OVERRIDES.get(case.name, {}))
    wanted = case.model_class.config_class
    found = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    return next((part for part in found if type(part) is wanted), config)


def build(case: Case, attn_implementation: str = "eager") -> PreTrainedModel:
    """Build the tiny model of a case: same case, same weights."""
    seed = zlib.crc32(case.name.encode()) + SALTS.get(case.name, 0)
    with torch.random.fork_rng():
        # Decay rates and the like keep what the model draws for them.
        torch.manual_seed(seed)
        # What `AutoModelForCausalLM.from_config` calls, for classes that are in no auto mapping as well.
        model = case.model_class._from_config(tiny_config(case), attn_implementation=attn_implementation)
    _draw_weights(model, seed)
    model.generation_config = _greedy(case, model)
    return model.eval()


def _greedy(case: Case, model: PreTrainedModel) -> GenerationConfig:
    """No token ends the text, none is forced or suppressed: every row runs to full length."""
    # Codebook models filter the start token out of what they return, so it stands behind the vocabulary.
    start, pad = (model.config.vocab_size,) * 2 if case.modality == "codebooks" else (START_TOKEN, PAD_TOKEN)
    return GenerationConfig(
        do_sample=False,
        num_return_sequences=1,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=pad,
        bos_token_id=start,
        decoder_start_token_id=start,
    )


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Redraw every weight; vectors (norms, biases, sinks, decay rates) keep their start values plus a little noise."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.add_(0.1 * noise)
        elif id(weight) in embeddings:
            weight.copy_(0.5 * noise)
        else:
            weight.copy_(noise * (_GAIN / math.sqrt(weight.shape[-1])))
