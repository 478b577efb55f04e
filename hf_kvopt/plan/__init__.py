"""Decide before loading: KV arithmetic of a model, facts of cards, and what to choose for a deployment."""

from hf_kvopt.plan.devices import DEVICES, Device, get_device
from hf_kvopt.plan.inputs import BadInput, parse_bytes, parse_tokens, show_bytes
from hf_kvopt.plan.memory import Capacity, LayerMemory, MemoryReport, memory

__all__ = [
    "DEVICES",
    "BadInput",
    "Capacity",
    "Device",
    "LayerMemory",
    "MemoryReport",
    "get_device",
    "memory",
    "parse_bytes",
    "parse_tokens",
    "show_bytes",
]
