"""Placement of a model and its cache on devices: on one, divided over several, or some layers on each.

    divided   tensor parallelism by the plan of the model's class; undivided parts are on every device
    spread    device_map="auto": each device holds a run of layers, and one of them works at a time

Plans cover one machine: the cost of a network between machines is not modelled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.geometry import LayerKV
from hf_kvopt.plan.weights import Weights

MOST_DEVICES = 8  # of one machine


@dataclass(frozen=True)
class Layout:
    """`count` devices, with the model divided over them or its layers spread."""

    count: int = 1
    is_divided: bool = False
    divides_kv: bool = False  # the heads of a divided model are divided, and the cache with them

    @property
    def kv_parts(self) -> int:
        """Devices that share the keys and values of a layer."""
        return self.count if self.divides_kv else 1

    def fullest(self, weights: Weights, kv_bytes: float, num_layers: int) -> float:
        """Return the bytes on the fullest device."""
        if self.is_divided and weights.split is not None:
            divided = weights.split.num_bytes
            return weights.num_bytes - divided * (1 - 1 / self.count) + kv_bytes / self.kv_parts
        share = math.ceil(num_layers / self.count) / num_layers
        return weights.outside_bytes + share * (weights.num_bytes - weights.outside_bytes + kv_bytes)


def layouts(weights: Weights, layers: Sequence[LayerKV], device: Device) -> list[Layout]:
    """Return the possible layouts on one machine, the preferred ones first."""
    if not device.is_gpu:
        return [Layout()]
    divided = [
        Layout(count, True, weights.split.divides_kv)
        for count in (2, 4, 8)
        if weights.split is not None and why_not_divided(weights, layers, count) is None
    ]
    return [Layout(), *divided, *(Layout(count) for count in range(2, MOST_DEVICES + 1))]


def why_not_divided(weights: Weights, layers: Sequence[LayerKV], count: int) -> str | None:
    """State why tensor parallelism cannot divide the model over `count` devices; None if it can."""
    split = weights.split
    if split is None:
        return "transformers has no plan to divide this model"
    heads = {layer.key_heads for layer in layers if layer.has_kv} if split.divides_kv else set()
    odd = sorted(number for number in heads if number % count)
    if odd:
        return f"{odd[0]} KV heads cannot be divided by {count}"
    if split.granule % count:
        return f"its matrices cannot be divided by {count}"
    return None
