"""Launches: the GPU families that configurations are keyed by, and what is handed to the device.

A launcher first writes its launches down (`plan_*`, which works on meta tensors too) and then runs them, so
that `evals/kernels.py` compiles ahead of time exactly what a launch would compile.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedDevice
from hf_kvopt.kernels.triton.optional import INTERPRET, tl


class Target(NamedTuple):
    """The properties of a device that a configuration may depend on."""

    family: str  # key of the configuration lists: interpret, sm80, sm90, sm100, cdna3
    num_sms: int
    capability: tuple[int, int]  # (0, 0) where there is none


INTERPRETER = Target("interpret", 4, (99, 0))


class Launch(NamedTuple):
    """One kernel launch, complete: arguments by parameter name, compile options apart."""

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    options: dict[str, Any]
    scratch: tuple[str, ...] = ()  # arguments that were allocated for this launch, and may be allocated anew
    constants: tuple[str, ...] = ()  # tensors that are the same ones at each call

    def run(self) -> Any:
        """Launch on the current stream of the device that the tensors live on; return what Triton compiled."""
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        # Triton launches on the current device, which is another one where a model is spread over several.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.kernel[self.grid](**self.args, **self.options)


class Config(NamedTuple):
    """Tile sizes and compile options of one kernel on one family."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False  # read keys and values through tensor descriptors where they suit

    @property
    def options(self) -> dict[str, int]:
        """The options that the compiler takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def family_of(capability: tuple[int, int]) -> str:
    """Return the configuration key of a CUDA compute capability; raises UnsupportedDevice below 8.0."""
    if capability < (8, 0):
        raise UnsupportedDevice(
            f"compute capability must be at least 8.0: got {capability[0]}.{capability[1]}; use the CPU or SDPA"
        )
    # 8.x and 12.x: the tiles fit the 99 KiB of shared memory that the least of them has for a block.
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


@functools.lru_cache(maxsize=64)
def device_target(index: int) -> Target:
    """Return the target of CUDA device `index`; raises UnsupportedDevice below compute capability 8.0."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("cdna3", properties.multi_processor_count, (0, 0))
    capability = torch.cuda.get_device_capability(index)
    return Target(family_of(capability), properties.multi_processor_count, capability)


def target_of(tensor: Tensor) -> Target:
    """Return the target that a kernel over this tensor runs on; raises UnsupportedDevice if there is none."""
    if tensor.is_cuda:
        return device_target(tensor.device.index or 0)
    if INTERPRET:
        return INTERPRETER
    raise UnsupportedDevice(
        f"Triton kernels need a CUDA tensor or TRITON_INTERPRET=1: got {tensor.device}; "
        "call the op through hf_kvopt.kernels, which takes the torch path there"
    )


def dot_dtype(dtype: torch.dtype, target: Target) -> Any:
    """Return the Triton type that `tl.dot` operands take: bfloat16 is raw bits to the interpreter."""
    if dtype == torch.float32 or (target.family == "interpret" and dtype == torch.bfloat16):
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
