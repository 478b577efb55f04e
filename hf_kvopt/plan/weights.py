"""Parameters and bytes of a model's weights, counted on the meta device: exact, and no byte of weights is made."""

from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_kvopt import compat
from hf_kvopt.errors import UnsupportedModel

_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
)
# Bits a weight of the quantized linear layers, scales included where the format fixes them.
_QUANTIZED_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25}


class Weights(NamedTuple):
    """What the weights of a model take, and what of them a step reads."""

    num_parameters: int
    num_bytes: int
    num_dense: int  # parameters that every token multiplies with
    num_expert: int = 0  # parameters of routed experts
    expert_share: float = 1.0  # of the experts that a token is sent to
    note: str = ""

    @property
    def num_active(self) -> float:
        """Parameters that one token multiplies with."""
        return self.num_dense + self.num_expert * self.expert_share

    def bytes_read(self, num_tokens: int) -> float:
        """Bytes that a step over `num_tokens` tokens reads, if each is sent to experts of its own choice."""
        touched = 1 - (1 - self.expert_share) ** num_tokens
        return self.num_bytes / self.num_parameters * (self.num_dense + self.num_expert * touched)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that generates with this config, or None where transformers has none."""
    for name in config.architectures or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, name)
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def require_kv_cache(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for models that do not generate, or from a past of their own kind, or from none."""
    model = model_class(config)
    if model is None:
        if hasattr(config.get_text_config(decoder=True), "use_cache"):
            return  # the decoder of a larger model
        raise UnsupportedModel(
            f"no class of transformers generates with a {config.model_type} config: got a model without a KV cache; "
            "expected a language model, for example model_type llama"
        )
    if not compat.uses_standard_cache(model):
        raise UnsupportedModel(
            f"{model.__name__} keeps its past in a cache of its own, or keeps none: got a model without keys and "
            "values to count; expected a model with attention, for example model_type llama"
        )


def count_weights(config: PreTrainedConfig, dtype: torch.dtype) -> Weights | None:
    """Return the weights in `dtype` (or as the config's quantization says); None where the model cannot be built."""
    model = _on_meta(config)
    if model is None:
        return None
    bits = _bits(config)
    num_bytes = 0.0
    outside = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        outside.add(id(head.weight))
    for weight in model.parameters():
        is_quantized = bits is not None and weight.ndim >= 2 and id(weight) not in outside
        num_bytes += weight.numel() * (bits / 8 if is_quantized and bits is not None else dtype.itemsize)
    total = sum(weight.numel() for weight in model.parameters())
    note = "" if bits is None else f"linear weights at {bits:g} bits by the config's quantization_config"
    return Weights(total, int(num_bytes), *_parts(model, config, total), note)


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel | None:
    kind = model_class(config)
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            return kind._from_config(config, attn_implementation="eager")
    except Exception:  # whatever a model does while it is built; the count is an extra
        return None


def _bits(config: PreTrainedConfig) -> float | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if fields.get("bits"):
        return float(fields["bits"])
    if fields.get("load_in_4bit"):
        return 4.0
    if fields.get("load_in_8bit"):
        return 8.0
    return _QUANTIZED_BITS.get(str(fields.get("quant_method")))


def _parts(model: PreTrainedModel, config: PreTrainedConfig, total: int) -> tuple[int, int, float]:
    """(parameters that each token reads, those of routed experts, share of the experts a token is sent to)."""
    decoder = config.get_text_config(decoder=True)
    chosen = getattr(decoder, "num_experts_per_tok", None) or getattr(decoder, "top_k_experts", None)
    stacks = [p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # Of the input embedding a token reads one row, unless it is the output's matrix as well.
    unread = 0 if head is not None and head.weight is table.weight else table.weight.numel()
    if not chosen or not stacks:
        return total - unread, 0, 1.0
    num_experts = max(stack.shape[0] for stack in stacks)
    routed = sum(p.numel() for p in stacks if p.shape[0] == num_experts)
    return total - unread - routed, routed, chosen / num_experts
