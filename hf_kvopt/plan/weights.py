"""Parameters and bytes of a model's weights, counted on the meta device: exact, and no byte of weights is made."""

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
# What a config calls the number of experts that a token is sent to.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class Part(NamedTuple):
    """Parameters that a step multiplies with, and their bytes; tensor parallelism divides `split_bytes` of them."""

    num: float
    num_bytes: float
    split_bytes: float = 0.0

    def share(self, num_devices: int) -> float:
        """Return the share that each of `num_devices` devices holds and reads: what is not divided lies on all."""
        split = self.split_bytes / self.num_bytes if self.num_bytes else 0.0
        return 1 - split * (1 - 1 / num_devices)


class Split(NamedTuple):
    """How transformers' tensor parallelism divides a model, by the plan of its class."""

    num_bytes: float  # of all weights, that are divided
    granule: int  # a number of devices must divide this
    divides_kv: bool  # the heads of attention are divided, and the cache with them


class Weights(NamedTuple):
    """What the weights of a model take, and what of them a step reads."""

    num_parameters: int
    num_bytes: int
    dense: Part  # what every token multiplies with
    expert: Part = Part(0, 0)  # all routed experts
    expert_share: float = 1.0  # of the experts that a token is sent to
    split: Split | None = None  # None: the class has no plan to divide its layers
    outside_bytes: float = 0.0  # of what lies outside of the decoder's layers
    compiles: bool = True  # generate() compiles a model that is stored so
    packs_latents: bool = False  # what expands latents is quantized, so that attention cannot absorb it
    notes: tuple[str, ...] = ()

    @property
    def num_active(self) -> float:
        """Parameters that one token multiplies with."""
        return self.dense.num + self.expert.num * self.expert_share

    def bytes_read(self, num_tokens: int, num_devices: int = 1) -> float:
        """Bytes that each device reads in a step over `num_tokens` tokens, each sent to experts of its own choice."""
        touched = 1 - (1 - self.expert_share) ** num_tokens
        dense, expert = self.dense, self.expert
        return dense.num_bytes * dense.share(num_devices) + expert.num_bytes * touched * expert.share(num_devices)


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
    if not compat.uses_standard_cache(model, config):
        raise UnsupportedModel(
            f"{model.__name__} keeps its past in a cache of its own, or keeps none: got a model without keys and "
            "values to count; expected a model with attention, for example model_type llama"
        )


def count_weights(config: PreTrainedConfig, dtype: torch.dtype, device: Device | None = None) -> Weights | None:
    """Return the weights in `dtype`, or as the config's quantization stores them; None where no model can be built.

    Args:
        config: of the model.
        dtype: of what is not quantized.
        device: where they go; some formats are unpacked where there are no kernels for them.
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
    """One parameter: what it takes, who reads it, and how tensor parallelism divides it."""

    name: str
    num: int
    num_bytes: float
    is_packed: bool
    is_read: bool  # by every decode step
    is_in_layer: bool
    num_experts: int  # that are stacked in it, 0 for none
    granule: int  # the length that is divided over devices, 0: it lies whole on each


def _tensors(model: PreTrainedModel, packing: Packing | None, dtype: torch.dtype) -> Iterator[_Tensor]:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table: Any = model.get_input_embeddings()
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(p) for p in (decoder if isinstance(decoder, torch.nn.Module) else model).parameters()}
    # Of the input embedding a token reads one row, unless it is the output's matrix as well.
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
    """The length, in tiles of `packing`, that the plan of a class divides; 0 where it leaves the tensor whole."""
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
    except Exception:  # whatever a model does while it is built; the count is an extra
        return None


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    parts = (config, config.get_text_config(decoder=True))
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None)) is not None), None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _compiles(fields: dict[str, Any]) -> bool:
    """Whether transformers' generate() compiles models of this quantization."""
    try:
        return bool(AutoHfQuantizer.from_config(dict(fields)).is_compileable)
    except Exception:  # an unknown method, or one whose package is missing
        return False


def _note(fields: dict[str, Any], packing: Packing | None, is_unpacked: bool, dtype: torch.dtype) -> str:
    method, name = fields.get("quant_method", "its method"), str(dtype).removeprefix("torch.")
    if packing is None:
        return f"quantization_config: {method} is not known here, so all weights are counted in {name}"
    if is_unpacked:
        return f"quantization_config: this device has no {method}; transformers unpacks the weights to {name}"
    what = "experts" if not packing.converts_linear else "linear layers"
    return f"quantization_config: {method} packs {what} at {packing.bits:g} bits and scales, the rest is in {name}"
