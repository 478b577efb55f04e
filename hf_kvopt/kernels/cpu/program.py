"""Kernels in this CPU's machine code, made at first use (kernels/cpu/jit/): whether there are any, and their threads.

They need llvmlite and a processor with AVX2 or AVX-512. Work is shared out over the threads that torch computes with,
which are those of torch's own OpenMP team and not a second one beside it.
"""

import ctypes
import importlib
import importlib.util
import logging
import os
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hf_kvopt.kernels.cpu import kept

logger = logging.getLogger(__name__)

MAX_DIM = 256
# Element types, by the names under which the kernels read and write them.
NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
# In a child of a fork the team's threads are missing, and whoever waits for them waits for ever.
_PROCESS = os.getpid()


@cache
def can_compile() -> bool:
    """Return whether this machine has what it takes."""
    if importlib.util.find_spec("llvmlite") is None:
        logger.info("llvmlite is not installed: the CPU takes torch's operations instead of kernels of its own")
        return False
    return _machine().lanes_here() is not None


@cache
def lanes() -> int:
    """float32 values in a vector register."""
    return _machine().lanes_here()


def compiled(kernel: str, spec: Any) -> Any:
    """The module jit/<kernel>.py compiled for `spec`: its `run` takes the address of the arguments.

    Compiling takes up to some seconds: what an earlier process compiled is taken from the user's cache folder.
    """
    start = time.perf_counter()
    path = kept.path_of(f"{kernel} {spec} {_machine().compiler_here()}")
    code = kept.read(path)
    if code is None:
        code = _machine().machine_code(importlib.import_module(f"{__package__}.jit.{kernel}").emit(spec), spec.lanes)
        kept.write(path, code)
    program = _machine().Program(code, _openmp(), spec.lanes)
    logger.debug("made %s for %s in %.2f s", kernel, spec, time.perf_counter() - start)
    return program


def num_threads() -> int:
    """Threads that share the work of a call."""
    return torch.get_num_threads() if _openmp() and os.getpid() == _PROCESS else 1


@cache
def bits_of(value: float) -> int:
    """A float as a kernel's argument."""
    return int.from_bytes(struct.pack("=d", value), "little", signed=True)


@cache
def _machine() -> Any:
    # Not at the top: it costs some 0.1 s, and a GPU has no need of it.
    return importlib.import_module(f"{__package__}.jit.machine")


@cache
def _openmp() -> dict[str, int]:
    """Addresses of the functions of the OpenMP library that torch is linked with; none where it is of another kind."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _machine().OPENMP}
    except (OSError, AttributeError):
        return {}
