"""Planning before a model is loaded: KV arithmetic, facts of devices, and the best settings for a deployment."""

from hf_kvopt.plan.capacity import Capacity
from hf_kvopt.plan.devices import DEVICES, Device, get_device
from hf_kvopt.plan.inputs import BadInput, parse_bytes, parse_tokens, show_bytes
from hf_kvopt.plan.memory import LayerMemory, MemoryReport, memory
from hf_kvopt.plan.options import Option
from hf_kvopt.plan.planner import Plan, Predicted, plan
from hf_kvopt.plan.weighing import Choice
from hf_kvopt.plan.workloads import WORKLOADS

__all__ = [
    "DEVICES",
    "WORKLOADS",
    "BadInput",
    "Capacity",
    "Choice",
    "Device",
    "LayerMemory",
    "MemoryReport",
    "Option",
    "Plan",
    "Predicted",
    "get_device",
    "memory",
    "parse_bytes",
    "parse_tokens",
    "plan",
    "show_bytes",
]
