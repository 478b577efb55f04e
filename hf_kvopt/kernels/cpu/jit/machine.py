"""Compiles an emitted module for the processor at hand."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

# Lanes by what the processor must have, best first. F16C is for float16 and the float8 codes.
_LEVELS = {16: ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"), 8: ("avx2", "fma", "f16c")}


class Program:
    """A compiled kernel; owns its machine code.

    Args:
        module: with one function `run(arguments)`.
        lanes: float32 values in the vectors that it was written for.
        openmp: addresses of OpenMP's functions; without them the kernel must be called for one thread.
    """

    def __init__(self, module: ir.Module, lanes: int, openmp: Mapping[str, int]) -> None:
        machine = _target_machine(lanes)
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(parsed, passes)
        self._engine: Any = llvm.create_mcjit_compiler(parsed, machine)
        for function in parsed.functions:
            if function.is_declaration and not function.name.startswith("llvm."):
                # Without one, any address will do: it is not called.
                self._engine.add_global_mapping(function, openmp.get(function.name, 1))
        self._engine.finalize_object()
        # A ctypes call does not hold the interpreter's lock.
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address("run"))


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
