"""Compiles an emitted module for the processor at hand."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

# What kernels call of OpenMP, by the names of libgomp; LLVM's and Intel's have these as well.
OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
# Lanes by what the processor must have, best first. F16C is for float16 and the float8 codes.
_LEVELS = {16: ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"), 8: ("avx2", "fma", "f16c")}


class Program:
    """A kernel in machine code, which it owns.

    Args:
        code: an object file that `machine_code` made on a processor like this one.
        openmp: addresses of OpenMP's functions; without them the kernel must be called for one thread.
        lanes: float32 values in the vectors that it was written for.
    """

    def __init__(self, code: bytes, openmp: Mapping[str, int], lanes: int) -> None:
        # Symbols are found by the names of a module's declarations.
        names = llvm.parse_assembly("".join(f"declare void @{name}()\n" for name in OPENMP))
        self._engine: Any = llvm.create_mcjit_compiler(names, _target_machine(lanes))
        for function in names.functions:
            # Without an address, any will do: it is not called.
            self._engine.add_global_mapping(function, openmp.get(function.name, 1))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        # A ctypes call does not hold the interpreter's lock.
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address("run"))


def machine_code(module: ir.Module, lanes: int) -> bytes:
    """Compile a module with one function `run(arguments)` to an object file for this processor."""
    machine = _target_machine(lanes)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = machine.emit_object(parsed)
    return code


def compiler_here() -> str:
    """Name the compiler and the processor that it compiles for: code of another pair must not be run."""
    return f"{llvmlite.__version__} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


@cache
def lanes_here() -> int | None:
    """float32 values in a vector register of this processor; None where no kernel was written for it."""
    features = llvm.get_host_cpu_features()
    for lanes, needed in _LEVELS.items():
        if all(features.get(name, False) for name in needed):
            return lanes
    return None


def _target_machine(lanes: int) -> Any:
    """This processor; where narrower vectors are asked for than it has, without the instructions for wider ones.

    A new one for each engine, which frees it.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if lanes == 8:
        features.update({name: False for name in features if name.startswith("avx512")})
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True, codemodel="jitdefault"
    )
