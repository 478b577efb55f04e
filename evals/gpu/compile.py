"""Ahead-of-time compilation of a Launch, without the GPU, and the resources that its machine code needs.

The signature is derived from the launch's arguments as Triton's launcher specializes them (1 becomes a constant,
multiples of 16 and aligned pointers are marked), so that the compiled code is the code that would be launched.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_kvopt.kernels.triton.launch import Launch, Target

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


class Card(NamedTuple):
    """Facts of a target for the compiler and the occupancy estimate."""

    name: str
    gpu: GPUTarget
    target: Target
    shared_per_block: int  # bytes that one block may use
    shared_per_sm: int
    registers_per_sm: int  # 32-bit
    threads_per_sm: int
    matrix: tuple[str, ...]  # instructions that use the card's matrix units as intended


KIB = 1024
# Shared memory: CUDA programming guide, "Technical Specifications per Compute Capability" (1 KiB of each block is the
# system's); gfx942: CDNA3 ISA guide, 64 KiB LDS and 512 vector registers of 4 SIMDs x 64 lanes.
CARDS = {
    "sm_80": Card(
        "sm_80", GPUTarget("cuda", 80, 32), Target("sm80", 108, (8, 0)), 163 * KIB, 164 * KIB, 65536, 2048, ("HMMA",)
    ),
    "sm_89": Card(
        "sm_89", GPUTarget("cuda", 89, 32), Target("sm80", 128, (8, 9)), 99 * KIB, 100 * KIB, 65536, 1536, ("HMMA",)
    ),
    "sm_90": Card(
        "sm_90", GPUTarget("cuda", 90, 32), Target("sm90", 132, (9, 0)), 227 * KIB, 228 * KIB, 65536, 2048, ("HGMMA",)
    ),
    "sm_100": Card(
        "sm_100", GPUTarget("cuda", 100, 32), Target("sm100", 148, (10, 0)), 227 * KIB, 228 * KIB, 65536, 2048,
        ("UTCHMMA", "UTCQMMA"),
    ),
    "gfx942": Card(
        "gfx942", GPUTarget("hip", "gfx942", 64), Target("cdna3", 304, (0, 0)), 64 * KIB, 64 * KIB, 131072, 2048,
        ("v_mfma",),
    ),
}  # fmt: skip


class Compiled(NamedTuple):
    """Resources that one kernel needs on one card."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: dict[str, int]  # instruction family: number of occurrences
    blocks_per_sm: int
    num_instructions: int
    loop_instructions: int  # of the shortest loop around a matrix instruction, which is over whole tiles; 0 if none


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Return (signature, constants, attributes) as Triton's launcher would derive them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    fixed = {p.name for p in launch.kernel.params if p.do_not_specialize}
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        if (
            name in constexprs
            or value is None
            or (value is not None and type(value) is int and value == 1 and name not in fixed)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER_TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif type(value).__name__ == "TensorDescriptor":
            shape = ",".join(str(n) for n in value.block_shape)
            signature[name] = f"tensordesc<{POINTER_TYPES[value.base.dtype][1:]}[{shape}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def launch_key(launch: Launch, card: Card) -> str:
    """Return a digest of everything that determines the machine code: source, signature, options, card, compiler."""
    signature, constants, attributes = signature_of(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    parts = (source.hash(), card.name, sorted(launch.options.items()), triton.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch: Launch, card: Card) -> Compiled:
    """Compile for the card; compiler errors propagate."""
    signature, constants, attributes = signature_of(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=card.gpu, options=launch.options)
    if card.gpu.backend == "hip":
        return _read_amd(compiled, launch, card)
    return _read_nvidia(compiled, launch, card)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _read_nvidia(compiled: Any, launch: Launch, card: Card) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    report = usage.stdout + usage.stderr
    registers = int(re.findall(r"REG:(\d+)", report)[-1])
    found = re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCOMMA|IMMA|QGMMA|UTMALDG|LDGSTS|FFMA|I2F|STL|LDL)\b", sass)
    matrix = {name: found.count(name) for name in sorted(set(found))}
    # ptxas spills to the stack; a frame without stores is not a spill.
    spills = int(re.findall(r"STACK:(\d+)", report)[-1]) if {"STL", "LDL"} & set(matrix) else 0
    threads = 32 * compiled.metadata.num_warps
    shared = compiled.metadata.shared
    per_thread = -(-registers // 8) * 8
    blocks = min(
        card.registers_per_sm // (per_thread * threads),
        card.shared_per_sm // (shared + KIB),
        card.threads_per_sm // threads,
        32,
    )
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]+\*/", sass, re.MULTILINE))
    loops = _loops(sass, r"\.L_x_\d+", r"\bBRA\b.*`\((\.L_x_\d+)\)")
    return Compiled(registers, spills, shared, matrix, blocks, instructions, _shortest(loops, "MMA"))


def _loops(text: str, label: str, branch: str) -> list[str]:
    """Return the instructions between each label and a branch back to it."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    found = []
    for position, line in enumerate(lines):
        here = re.match(rf"({label}):", line)
        if here:
            labels[here.group(1)] = position
        back = re.search(branch, line)
        if back and back.group(1) in labels:
            body = lines[labels[back.group(1)] : position + 1]
            found.append("\n".join(x for x in body if re.match(r"\s", x) and x.strip()))
    return found


def _shortest(loops: list[str], matrix: str) -> int:
    """Return the number of lines of the shortest loop with a matrix instruction; 0 if there is none."""
    return min((loop.count("\n") + 1 for loop in loops if matrix in loop), default=0)


def _read_amd(compiled: Any, launch: Launch, card: Card) -> Compiled:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    vector = field("vgpr_count")
    spills = field("private_segment_fixed_size")
    found = re.findall(r"\b(v_mfma|v_fma_f32|v_cvt|scratch_store|global_load_lds|buffer_load)\w*", text)
    matrix = {name: found.count(name) for name in sorted(set(found))}
    # 512 registers of a lane and SIMD in steps of 8; the waves of a block are spread over 4 SIMDs.
    waves_per_simd = min(8, 512 // max(8, -(-vector // 8) * 8))
    blocks = min(
        waves_per_simd * 4 // compiled.metadata.num_warps, card.shared_per_sm // max(1, compiled.metadata.shared)
    )
    loops = _loops(text, r"\.LBB\d+_\d+", r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)")
    return Compiled(
        vector, spills, compiled.metadata.shared, matrix, blocks, text.count("\n"), _shortest(loops, "mfma")
    )
