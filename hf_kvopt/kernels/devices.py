"""Which devices run the Triton kernels, and which storage formats a device can read."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedDevice
from hf_kvopt.kernels.triton.launch import Target, device_target, target_of
from hf_kvopt.kernels.triton.optional import HAS_TRITON, INTERPRET
from hf_kvopt.quant import Format


def runs_kernel(tensor: Tensor) -> bool:
    """Return whether an op over this tensor runs the Triton kernel; raises UnsupportedDevice on CUDA without Triton."""
    if tensor.is_cuda and not HAS_TRITON:
        raise UnsupportedDevice("kernels on CUDA need Triton: got none installed; pip install triton, or use the CPU")
    return tensor.is_cuda or (INTERPRET and tensor.device.type == "cpu")


def is_on_host(tensor: Tensor) -> bool:
    """Return whether reading a value of this tensor waits for nothing; a step must not read what lies on a device."""
    return tensor.device.type == "cpu"


def require_format(fmt: Format, like: Tensor) -> None:
    """Raise UnsupportedDevice if kernels on this tensor's device cannot read the format; for cache construction."""
    if runs_kernel(like):
        check_format_runs(fmt, target_of(like))


def require_format_somewhere(fmt: Format) -> None:
    """Raise UnsupportedDevice if there are CUDA cards and the best of them cannot read the format."""
    targets = [device_target(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if targets:
        check_format_runs(fmt, max(targets, key=lambda target: target.capability))


def check_format_runs(fmt: Format, target: Target) -> None:
    """Raise UnsupportedDevice if this card cannot read the format; call it when a cache is built."""
    if fmt.min_capability is not None and (0, 0) < target.capability < fmt.min_capability:
        need = ".".join(map(str, fmt.min_capability))
        have = ".".join(map(str, target.capability))
        raise UnsupportedDevice(f"{fmt.name} needs compute capability {need}: got {have}; use int8 instead")
