"""Facts of devices: one table, each row with its source. Figures are datasheet peaks without sparsity.

Kernels reach less: 85 to 92 % of the bandwidth on a long read, 60 to 75 % of the product rate.
"""

import os
import platform
import re
import time
from typing import NamedTuple

import torch

from hf_kvopt.plan.inputs import BadInput

GB, GIB = 1000**3, 1024**3


class Device(NamedTuple):
    """Memory, bandwidth and arithmetic rate of a device, for planning, and their source."""

    name: str
    memory_bytes: int
    bandwidth: float  # memory bandwidth, bytes a second
    flops: float  # operations a second: bf16 products (fp16 without bf16) with float32 accumulation
    capability: tuple[int, int] | None  # CUDA compute capability; None off CUDA
    source: str

    @property
    def is_gpu(self) -> bool:
        """Return whether it runs Triton kernels."""
        return not self.name.startswith("cpu")


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_ROWS = (
    Device("B200", 180 * GB, 8.0e12, 2250e12, (10, 0), f"{_NVIDIA}/dgx-b200/ (an eighth of 1,440 GB and 64 TB/s)"),
    Device("H200", 141 * GB, 4.8e12, 989e12, (9, 0), f"{_NVIDIA}/h200/"),
    Device("H100", 80 * GB, 3.35e12, 989e12, (9, 0), f"{_NVIDIA}/h100/ (SXM)"),
    Device("H100-PCIE", 80 * GB, 2.0e12, 756e12, (9, 0), f"{_NVIDIA}/h100/ (PCIe)"),
    Device("A100-80", 80 * GB, 2.039e12, 312e12, (8, 0), f"{_NVIDIA}/a100/ (SXM)"),
    Device("A100-40", 40 * GB, 1.555e12, 312e12, (8, 0), f"{_NVIDIA}/a100/"),
    Device("L40S", 48 * GB, 0.864e12, 362e12, (8, 9), f"{_NVIDIA}/l40s/"),
    Device("L4", 24 * GB, 0.3e12, 121e12, (8, 9), f"{_NVIDIA}/l4/"),
    Device("A10", 24 * GB, 0.6e12, 125e12, (8, 6), f"{_NVIDIA}/products/a10-gpu/"),
    Device("T4", 16 * GB, 0.32e12, 65e12, (7, 5), f"{_NVIDIA}/tesla-t4/ (fp16)"),
    Device("RTX5090", 32 * GIB, 1.792e12, 209.5e12, (12, 0), "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    Device("RTX4090", 24 * GIB, 1.008e12, 165.2e12, (8, 9), "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    Device("RTX3090", 24 * GIB, 0.936e12, 71e12, (8, 6), "NVIDIA Ampere GA102 whitepaper, appendix A"),
    Device(
        "MI300X", 192 * GB, 5.3e12, 1307e12, None, "https://www.amd.com/en/products/accelerators/instinct/mi300.html"
    ),
)
DEVICES: dict[str, Device] = {row.name: row for row in _ROWS}


def get_device(name: str) -> Device:
    """Return the device called `name`: one of the table, `cpu` (measured on this machine), or `auto` (the current one).

    Raises:
        BadInput: the name is unknown; the message lists the known ones.
    """
    if name == "auto":
        return _cuda_here() if torch.cuda.is_available() else _cpu_here()
    if name == "cpu":
        return _cpu_here()
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise BadInput(f"device must be auto, cpu or one of {', '.join(DEVICES)}: got {name!r}; for example H200")


def _cuda_here() -> Device:
    properties = torch.cuda.get_device_properties(0)
    words = re.sub(r"[^a-z0-9]", "", properties.name.lower())
    capability = (properties.major, properties.minor)
    fitting = [d for d in _ROWS if d.name.split("-")[0].lower() in words and d.capability in (capability, None)]
    if not fitting:
        raise BadInput(
            f"device 'auto' found {properties.name}, of which no bandwidth is known: expected one of "
            f"{', '.join(DEVICES)}; name the nearest, for example --device H100"
        )
    nearest = min(fitting, key=lambda device: abs(device.memory_bytes - properties.total_memory))
    return nearest._replace(memory_bytes=properties.total_memory, capability=capability)


def _cpu_here() -> Device:
    """Return this machine as a device: all of its memory, its measured read bandwidth and float32 product rate."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    data, square = torch.ones(32 << 20), torch.ones(768, 768)
    read = _best_seconds(lambda: data.sum())
    product = _best_seconds(lambda: square @ square)
    source = f"measured here: a sum over 128 MiB, a float32 product of 768 x 768, {torch.get_num_threads()} threads"
    return Device(f"cpu ({platform.machine()})", memory, data.nbytes / read, 2 * 768**3 / product, None, source)


def _best_seconds(call: object, repeats: int = 5) -> float:
    assert callable(call)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
