"""Identity of a model: what the keys and values of a text depend on beside the text, its very weights included.

`ModelIdentity` is for one process and cheap, asked at every prompt; `fingerprint` is for files and reads more of the
weights.
"""

import hashlib
import json
import threading
import weakref
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.prefix import steps
from hf_kvopt.prefix.attributes import WITHOUT_MEANING, Attributes, hooks_of, settings_of
from hf_kvopt.prefix.samples import Samples, parts_of

_SHARED_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "dummy")
_SAMPLES = 1024


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
    kinds = set(compat.layer_types(decoder)[0])
    others = sorted(kind for kind in kinds - set(_SHARED_KINDS) if not compat.holds_states(kind))
    if others:
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got layers of kind {', '.join(others)}, whose storage is not cut "
            f"at a prefix; {advice}"
        )
    if kinds <= set(compat.WITHOUT_KV) or compat.keeps_states_in_modules(decoder):
        raise UnsupportedModel(
            f"prefixes cannot be shared for {name}: got a model without keys and values in a cache, or one that keeps "
            f"its states in its modules, where no cache sees them; {advice}"
        )
    scaled = sorted(compat.length_dependent_rope(decoder))
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


class ModelIdentity:
    """Tells whether a model still computes what it computed: one for each prefix store, cheap, for one process.

    Equal states mean that a forward gives equal keys and values. Seen are

    * steps of any torch optimizer over the model's parameters, fused ones too, and every write that torch counts;
    * tensors that were replaced, and writes around torch (`.data`, numpy) to all of a parameter, buffer or other tensor
      in an attribute of a module;
    * modules, `forward` methods, forward hooks, adapters and their scales, and every number, string or function in an
      attribute of a module or a value of a config, the attention implementation and `training` included;
    * autocast, and the precision of matrix products.

    Not seen are a write around torch to a few elements, what hooks and closures hold, and code replaced from outside of
    the model, like a function of the module that defines it. Of offloaded weights those in memory are seen, not those
    on a disk.

    Holds no part of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._attributes, self._samples = Attributes(), Samples()
        self._lock = threading.Lock()
        self._ids: set[int] = set()
        self._steps = 0
        # Whether a look in the middle of a forward finds what a look before it does; as of the last `state`.
        self.is_in_place = True
        steps.watch(self)

    def state(self) -> bytes | None:
        """Return a digest of all that is seen; None where tokens alone do not decide what is computed.

        That is so where the rows of a batch go through adapters of their own (PEFT's `adapter_names`), and where
        something is put before the prompt (PEFT's soft prompts).

        Raises:
            CacheStateError: the model is gone.
        """
        model = self._model()
        if model is None:
            raise CacheStateError("the model of this prefix store is gone: got a further use of it; make a new store")
        with self._lock:
            walk = self._attributes.walk(model)
            self.is_in_place = not walk.is_elsewhere
            # One that is put aside and stepped on is another where it comes back: see `_Described`.
            self._ids = {*map(id, walk.tensors)}
            walk.texts.append(f"{self._steps} {modes(model.device)}")
            digest = hashlib.blake2b("\n".join(walk.texts).encode(), digest_size=16)
            for part in self._samples.read(walk.tensors):
                digest.update(part)
        return None if walk.is_rowwise or _is_fed_more(model) else digest.digest()

    def note_step(self, ids: Set[int]) -> None:
        """Take note of a step of an optimizer that holds the parameters of these ids."""
        if not self._ids.isdisjoint(ids):
            self._steps += 1


def _is_fed_more(model: nn.Module) -> bool:
    """Return whether another method than the model's own makes the inputs of a forward from a prompt."""
    override = model.__dict__.get(compat.PREPARE_INPUTS)
    if override is None or getattr(override, "adds_nothing", False):
        return False
    return getattr(override, "__func__", None) is not getattr(type(model), compat.PREPARE_INPUTS, None)


def modes(device: torch.device) -> list[Any]:
    """Return what torch is set to do in every operation."""
    kinds = sorted({"cpu", "cuda", device.type} - {"meta"})
    casts = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in kinds]
    return [torch.get_float32_matmul_precision(), *casts]


def fingerprint(model: PreTrainedModel, *, whole: bool = False) -> str:
    """A digest of config, settings and evenly spread samples of every tensor: the same in another process.

    Args:
        model: the model.
        whole: read every element of every tensor, not samples: a second for each gigabyte.

    Raises:
        CacheStateError: forward hooks or replaced methods, which nobody can tell from others there; weights that are
            offloaded or divided over ranks.
    """
    meaningless = {*WITHOUT_MEANING, "_attn_implementation"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in meaningless}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors: dict[str, Tensor] = dict(model.state_dict())
    _require_undivided(tensors)
    for name, module in model.named_modules():
        _require_plain_forward(name, module)
        # Tensors that are not saved with the weights change what is computed no less.
        tensors |= {f"{name}.{key}": buffer for key, buffer in module._buffers.items() if buffer is not None}
        text, unnamed = settings_of(module)
        digest.update(f"{name} {text}".encode())
        tensors |= {f"{name} {i}": tensor for i, tensor in enumerate(unnamed)}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise CacheStateError(
                f"a file is told from those of other models by all weights: got {name}, which is offloaded; "
                "save and load stores with the whole model in memory"
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in parts_of([tensor]):
            flat = part.detach().flatten()
            picked = (flat if whole else flat[:: max(1, len(flat) // _SAMPLES)]).to("cpu").contiguous()
            digest.update(picked.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_undivided(tensors: dict[str, Tensor]) -> None:
    """Raise CacheStateError where a rank holds a part of a weight, and its store the blocks of some heads alone."""
    divided = next((name for name, tensor in tensors.items() if isinstance(tensor, DTensor)), None)
    if divided is not None:
        raise CacheStateError(
            f"a file holds the blocks of all heads: got {divided} of a model that is divided over ranks; save and load "
            "stores with the whole model in one process"
        )


def _require_plain_forward(name: str, module: nn.Module) -> None:
    hooks = [hook for _, hook in (*hooks_of(module), *hooks_of(None))]
    # Those of accelerate place tensors and change nothing.
    is_replaced = "forward" in module.__dict__ and "_hf_hook" not in module.__dict__
    if hooks or is_replaced or _is_fed_more(module):
        what = f"the forward hook {hooks[0]!r}" if hooks else "a method that was replaced"
        raise CacheStateError(
            f"a file cannot say what hooks and replaced methods compute: got {what} on "
            f"{name or type(module).__name__}; take it off before saving or loading a store"
        )
