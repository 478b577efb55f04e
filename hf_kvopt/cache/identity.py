"""What the keys and values of a text depend on beside the text: the model, its adapters, its very weights.

`state_of` is for one process and cheap, asked at every prompt; `fingerprint` is for files and reads samples of the
weights.
"""

import hashlib
import json
from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.errors import UnsupportedModel

_SHARED_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "dummy")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_SAMPLES = 1024
# Parts of a config that change nothing that is computed.
_WITHOUT_MEANING = ("_name_or_path", "transformers_version", "architectures", "use_cache", "_attn_implementation")


def require_shareable(config: PreTrainedConfig, forward_parameters: Any = None) -> None:
    """Raise UnsupportedModel unless the keys and values of a token depend on the tokens before it alone.

    Args:
        config: the model's config.
        forward_parameters: names that its forward takes, where the model is at hand.
    """
    name = type(config).__name__
    advice = "use PagedCache for this model"
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got an encoder-decoder, whose decoder's keys and values depend on "
            f"the encoder's input as well as on the tokens; {advice}"
        )
    decoder = config.get_text_config(decoder=True)
    kinds = sorted(set(compat.layer_types(decoder)[0]) - set(_SHARED_KINDS))
    if kinds:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got layers of kind {', '.join(kinds)}, whose states sum up a text "
            f"and cannot be cut at a prefix; {advice}"
        )
    scaled = sorted(_rope_types(decoder) & set(_LENGTH_DEPENDENT_ROPE))
    if scaled:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got rotary scaling of type {', '.join(scaled)}, by which a token's "
            f"keys depend on the length of the whole text; {advice}"
        )
    if forward_parameters is not None and "position_ids" not in forward_parameters:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got a model that takes no position_ids, so that its positions "
            f"count padding; {advice}"
        )


def state_of(model: PreTrainedModel) -> Hashable:
    """Changes whenever a forward of `model` may give other keys and values: dtype, adapters, weights written to."""
    adapters: list[Hashable] = []
    versions: list[Hashable] = []
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters") and isinstance(getattr(module, "active_adapters", None), list | tuple):
            merged = getattr(module, "merged_adapters", ())
            adapters.append((name, *module.active_adapters, bool(module.disable_adapters), *merged))
        for parameter in module._parameters.values():
            if parameter is not None:
                # The place too: `parameter.data = ...` leaves the version alone. Weights of other layouts have none.
                place = parameter.data_ptr() if type(parameter) is torch.nn.Parameter else id(parameter)
                versions.append((place, 0 if parameter.is_inference() else parameter._version))
    return str(model.dtype), tuple(adapters), hash(tuple(versions)), model.training


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of config, dtype and evenly spread samples of every parameter: the same in another process."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _WITHOUT_MEANING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu").contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rope_types(config: PreTrainedConfig) -> set[str]:
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None) or {}
        # One set of parameters, or one for each kind of layer.
        for part in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
            found |= {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)}
    return found
