"""Parameters and bytes of a model's weights, counted exactly on the meta device without allocating them."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.quantizers import AutoHfQuantizer

from hf_kvopt import compat
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.quantized import Packing, is_unpacked_on, packing_of

_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
)
# Config fields for the number of experts of a token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class Part(NamedTuple):
    """Parameters that a step multiplies with, and their bytes; tensor parallelism divides `split_bytes` of them."""

    num: float
    num_bytes: float
    split_bytes: float = 0.0

    def share(self, num_devices: int) -> float:
        """Return the share that each of `num_devices` devices holds and reads; undivided parts are on all of them."""
        split = self.split_bytes / self.num_bytes if self.num_bytes else 0.0
        return 1 - split * (1 - 1 / num_devices)


class Split(NamedTuple):
    """Division of a model by transformers' tensor parallelism, by the plan of its class."""

    num_bytes: float  # of all divided weights
    granule: int  # the number of devices must divide this
    divides_kv: bool  # the attention heads are divided, and the cache with them


class Weights(NamedTuple):
    """Size of the weights of a model, and the parts that a step reads."""

    num_parameters: int
    num_bytes: int
    dense: Part  # weights that every token is multiplied with
    expert: Part = Part(0, 0)  # all routed experts
    expert_share: float = 1.0  # share of the experts that a token is sent to
    split: Split | None = None  # None: the class has no plan to divide its layers
    outside_bytes: float = 0.0  # bytes outside of the decoder's layers
    compiles: bool = True  # generate() compiles a model stored this way
    packs_latents: bool = False  # the projection that expands latents is quantized, so that attention cannot absorb it
    notes: tuple[str, ...] = ()

    @property
    def num_active(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.dense.num + self.expert.num * self.expert_share

    def bytes_read(self, num_tokens: int, num_devices: int = 1) -> float:
        """Return the bytes that each device reads in a step of `num_tokens` tokens, each sent to its own experts."""
        touched = 1 - (1 - self.expert_share) ** num_tokens
        dense, expert = self.dense, self.expert
        return dense.num_bytes * dense.share(num_devices) + expert.num_bytes * touched * expert.share(num_devices)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that generates with this config, or None if transformers has none."""
    for name in config.architectures or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, name)
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def require_kv_cache(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for a model that does not generate, or that keeps no cache of the standard kind."""
    model = model_class(config)
    if model is None:
        if hasattr(config.get_text_config(decoder=True), "use_cache"):
            return  # the decoder of a larger model
        raise UnsupportedModel(
            f"no class of transformers generates with a {config.model_type} config: got a model without a KV cache; "
            "expected a language model, for example model_type llama"
        )
    if not compat.uses_standard_cache(model, config):
        raise UnsupportedModel(
            f"{model.__name__} keeps its past in a cache of its own, or keeps none: got a model without keys and "
            "values to count; expected a model with attention, for example model_type llama"
        )


def count_weights(config: PreTrainedConfig, dtype: torch.dtype, device: Device | None = None) -> Weights | None:
    """Return the weights in `dtype`, or as the config's quantization stores them; None if no model can be built.

    Args:
        config: config of the model.
        dtype: dtype of weights that are not quantized.
        device: target device; some formats are unpacked on devices without kernels for them.
    """
    model = _on_meta(config)
    if model is None:
        return None
    fields = _quantization(config)
    packing = None if fields is None else packing_of(fields)
    is_unpacked = fields is not None and device is not None and is_unpacked_on(fields, device)
    tensors = list(_tensors(model, None if is_unpacked else packing, dtype))
    total = sum(tensor.num for tensor in tensors)
    expert_share = _expert_share(config, tensors)
    read = [tensor for tensor in tensors if tensor.is_read]
    return Weights(
        num_parameters=int(total),
        num_bytes=round(sum(tensor.num_bytes for tensor in tensors)),
        dense=_part(tensor for tensor in read if not (tensor.num_experts and expert_share < 1)),
        expert=_part(tensor for tensor in read if tensor.num_experts and expert_share < 1),
        expert_share=expert_share,
        split=_split(tensors),
        outside_bytes=sum(tensor.num_bytes for tensor in tensors if not tensor.is_in_layer),
        compiles=fields is None or _compiles(fields),
        packs_latents=any(".kv_b_proj." in tensor.name for tensor in tensors if tensor.is_packed),
        notes=() if fields is None else (_note(fields, packing, is_unpacked, dtype),),
    )


class _Tensor(NamedTuple):
    """One parameter: its size, its readers, and its division by tensor parallelism."""

    name: str
    num: int
    num_bytes: float
    is_packed: bool
    is_read: bool  # by every decode step
    is_in_layer: bool
    num_experts: int  # stacked in it; 0 for none
    granule: int  # length that is divided over devices; 0: undivided


def _tensors(model: PreTrainedModel, packing: Packing | None, dtype: torch.dtype) -> Iterator[_Tensor]:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table: Any = model.get_input_embeddings()
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(p) for p in (decoder if isinstance(decoder, torch.nn.Module) else model).parameters()}
    # A token reads one row of the input embedding, unless that is also the output matrix.
    unread = set() if head is not None and head.weight is table.weight else {id(table.weight)}
    outputs = set() if head is None else {id(p) for p in head.parameters()}
    plan = getattr(model, "tp_plan", None) or {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        is_packed = packing is not None and packing.converts(module_name, module, head)
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            path = f"{module_name}.{name}" if module_name else name
            is_matrix = weight.ndim >= 2 and "bias" not in name
            size = weight.numel() * dtype.itemsize
            if is_packed and is_matrix and packing is not None:
                size = packing.packed_bytes(weight.shape)
            yield _Tensor(
                name=path,
                num=weight.numel(),
                num_bytes=size,
                is_packed=is_packed and is_matrix,
                is_read=(id(weight) in inside or id(weight) in outputs) and id(weight) not in unread,
                is_in_layer=re.search(r"\.\d+\.", path) is not None,
                num_experts=weight.shape[0] if ".experts." in path and weight.ndim >= 2 else 0,
                granule=_granule(plan, path, weight.shape, packing if is_packed else None),
            )


def _granule(plan: Mapping[str, str], path: str, shape: torch.Size, packing: Packing | None) -> int:
    """Return the length, in tiles of `packing`, that the plan of a class divides; 0 if it leaves the tensor whole."""
    general = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    style = plan.get(general) or plan.get(general.rpartition(".")[0]) or ""
    if len(shape) < 2 or not re.match(r"(packed_)?(colwise|rowwise)|embedding", style):
        return 0
    is_column = "colwise" in style
    tiles = [(s.rows if is_column else s.columns) or 1 for s in packing.scales] if packing else [1]
    length = shape[-2] if is_column or "embedding" in style else shape[-1]
    return length // (2 if style.startswith("packed") else 1) // max(tiles) or 1


def _split(tensors: Sequence[_Tensor]) -> Split | None:
    divided = [tensor for tensor in tensors if tensor.granule]
    if not any(tensor.is_in_layer for tensor in divided):
        return None
    return Split(
        num_bytes=sum(tensor.num_bytes for tensor in divided),
        granule=math.gcd(*(tensor.granule for tensor in divided)),
        divides_kv=any(".k_proj." in tensor.name for tensor in divided),
    )


def _part(tensors: Iterable[_Tensor]) -> Part:
    found = list(tensors)
    split = sum(tensor.num_bytes for tensor in found if tensor.granule)
    return Part(sum(tensor.num for tensor in found), sum(tensor.num_bytes for tensor in found), split)


def _expert_share(config: PreTrainedConfig, tensors: Sequence[_Tensor]) -> float:
    decoder = config.get_text_config(decoder=True)
    chosen = next((n for name in _EXPERTS_PER_TOKEN if isinstance(n := getattr(decoder, name, None), int) and n), None)
    num_experts = max((tensor.num_experts for tensor in tensors), default=0)
    return min(1.0, chosen / num_experts) if chosen and num_experts else 1.0


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel | None:
    kind = model_class(config)
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            return kind._from_config(config, attn_implementation="eager")
    except Exception:  # building a model may raise anything, and the count is optional
        return None


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    parts = (config, config.get_text_config(decoder=True))
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None)) is not None), None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _compiles(fields: dict[str, Any]) -> bool:
    """Return whether transformers' generate() compiles models of this quantization."""
    try:
        return bool(AutoHfQuantizer.from_config(dict(fields)).is_compileable)
    except Exception:  # an unknown method, or a missing package
        return False


def _note(fields: dict[str, Any], packing: Packing | None, is_unpacked: bool, dtype: torch.dtype) -> str:
    method, name = fields.get("quant_method", "its method"), str(dtype).removeprefix("torch.")
    if packing is None:
        return f"quantization_config: {method} is not known here, so all weights are counted in {name}"
    if is_unpacked:
        return f"quantization_config: this device has no {method}; transformers unpacks the weights to {name}"
    what = "experts" if not packing.converts_linear else "linear layers"
    return f"quantization_config: {method} packs {what} at {packing.bits:g} bits and scales, the rest is in {name}"
