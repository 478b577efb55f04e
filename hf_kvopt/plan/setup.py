"""The question that a plan answers: model, device, workload, and the memory and times that follow from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_kvopt import compat
from hf_kvopt.plan.capacity import CARD_SHARE
from hf_kvopt.plan.devices import Device, get_device
from hf_kvopt.plan.geometry import LayerKV, layers_of
from hf_kvopt.plan.inputs import BadInput, parse_bytes, parse_tokens, require_positive, show_bytes
from hf_kvopt.plan.kv_bytes import CacheSpec, kv_bytes
from hf_kvopt.plan.memory import chosen_dtype
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.steps import StepModel
from hf_kvopt.plan.weights import Weights, count_weights, model_class, require_kv_cache
from hf_kvopt.plan.workloads import WORKLOADS, Workload
from hf_kvopt.quant import FormatPolicy

GOALS = ("latency", "throughput")
# By measured loss on a small model and by what peers publish: the least harmful first.
FORMATS = ("native", "int8", "k8v4", "int4")
MOST_DEVICES = 64


@dataclass(frozen=True)
class Setup:
    """Everything that a plan is made from."""

    config: Any
    layers: tuple[LayerKV, ...]
    weights: Weights
    dtype: torch.dtype
    device: Device
    workload: str
    goal: str
    batch: int
    context: int
    budget: int  # bytes a device

    @property
    def work(self) -> Workload:
        """The numbers of the workload."""
        return WORKLOADS[self.workload]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return max(1, int(self.context * self.work.prompt_share))

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """Formats that can pack this model's channels."""
        is_odd = any(n % 2 for layer in self.layers if layer.is_paged for n in (layer.key_dim, layer.value_dim))
        return FORMATS[:2] if is_odd else FORMATS

    @property
    def takes_attention(self) -> bool:
        """Whether the model's attention can be chosen, and reads all keys."""
        model = model_class(self.config)
        indexed = any(layer.has_kv and not layer.is_paged for layer in self.layers)
        return not indexed and model is not None and compat.can_choose_attention(model)

    @property
    def has_states(self) -> bool:
        """Whether some layer's past is a state, which cannot be cut, shared or verified token by token."""
        return any("states" in layer.kind for layer in self.layers)

    def kv(self, format: str, batch: int | None = None, block_size: int = 16) -> int:
        """Bytes of the blocks of `batch` rows (the question's) at the full context."""
        spec = CacheSpec(formats=FormatPolicy(format=format), block_size=block_size, dtype=self.dtype)
        size = kv_bytes(self.layers, spec.formats_of(self.layers), spec, batch or self.batch, self.context, None)
        return size.used + size.stock

    def num_devices(self, format: str) -> int | None:
        """The least power of two of devices that hold weights and cache; None beyond 64."""
        needed, count = self.weights.num_bytes + self.kv(format), 1
        while needed > count * self.budget:
            count *= 2
        return count if count <= MOST_DEVICES else None

    def largest_batch(self, format: str, num_devices: int) -> int:
        """Rows that fit beside the weights."""
        row = self.kv(format, 1)
        room = num_devices * self.budget - self.weights.num_bytes
        return max(0, room // row) if row else self.batch

    def steps(self, num_devices: int) -> StepModel:
        """The time model; devices beyond the first share the work evenly, their traffic not counted."""
        many = self.device._replace(
            bandwidth=self.device.bandwidth * num_devices, flops=self.device.flops * num_devices
        )
        growing = [layer for layer in self.layers if layer.has_kv and layer.window is None]
        return StepModel(
            device=many,
            weights=self.weights,
            num_layers=len(self.layers),
            attention_flops=sum(layer.flops_per_pair for layer in growing),
        )


def set_up(
    model: Any,
    device: str | Device,
    context: int | str,
    batch: int,
    workload: str,
    goal: str,
    budget: int | str | None,
    dtype: torch.dtype | str | None,
) -> Setup:
    """Check the question; see `plan` for the arguments.

    Raises:
        BadInput, UnsupportedModel: what is wrong with it.
    """
    config = load_config(model)
    require_kv_cache(config)
    for name, value, known in (("workload", workload, tuple(WORKLOADS)), ("goal", goal, GOALS)):
        if value not in known:
            raise BadInput(f"{name} must be one of {', '.join(known)}: got {value!r}; for example {name}={known[0]!r}")
    place = get_device(device) if isinstance(device, str) else device
    precision = chosen_dtype(dtype, config)
    weights = count_weights(config, precision)
    if weights is None:
        raise BadInput(f"the weights of this {config.model_type} cannot be counted from its config: nothing to plan by")
    size = parse_bytes(budget, "budget") if budget is not None else int(place.memory_bytes * CARD_SHARE)
    setup = Setup(
        config=config,
        layers=tuple(layers_of(config)),
        weights=weights,
        dtype=precision,
        device=place,
        workload=workload,
        goal=goal,
        batch=require_positive(batch, "batch", 8),
        context=parse_tokens(context, "context"),
        budget=size,
    )
    if setup.num_devices(setup.formats[-1]) is None:
        needed = weights.num_bytes + setup.kv(setup.formats[-1])
        raise BadInput(
            f"budget of {show_bytes(size)} a device is impossible: weights take {show_bytes(weights.num_bytes)}, and "
            f"with the smallest cache {show_bytes(needed)} are needed, more than {MOST_DEVICES} devices hold; expected "
            f"for example budget='{-(-needed // MOST_DEVICES // 2**30) + 1}GiB', or a shorter context"
        )
    return setup
