"""Sealing of full blocks on a CPU, in machine code made at first use (cpu/jit/seal.py); see quant/sealed.py."""

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.cpu.jit.spec import SealSpec
from hf_kvopt.kernels.cpu.program import NAMES, can_compile, compiled, lanes, num_threads
from hf_kvopt.kernels.cpu.sealed_place import SealedPlace

# Channels below which one thread is done before a second has begun.
_SERIAL_WORK = 1 << 15


def can_seal(place: SealedPlace, sources: Sequence[Tensor]) -> bool:
    """Return whether `seal_blocks` takes this call."""
    group = place.dim // place.codec.num_groups(place.dim)
    if not can_compile() or torch.compiler.is_compiling() or (group < place.dim and group % lanes()):
        return False
    return all(type(x) is Tensor and NAMES.get(x.dtype) == place.code and x.stride(2) == 1 for x in sources)


def seal_blocks(
    place: SealedPlace,  # of keys or values, which are written
    blocks: Sequence[int],
    sources: Sequence[Tensor],  # for each block [num_kv_heads, block_size, head_dim] as the model computed them
) -> None:
    """Store the sealed form of each block under its number, from its own tokens alone."""
    program = _program(place.dim, place.code, place.codec, place.block_size, lanes())
    by_strides: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for block, states in zip(blocks, sources, strict=True):
        numbers, addresses = by_strides.setdefault(states.stride(), ([], []))
        numbers.append(block)
        addresses.append(states.data_ptr())
    item = sources[0].element_size()
    work = place.num_heads * place.block_size * place.dim
    for strides, (numbers, addresses) in by_strides.items():
        given = [array("q", addresses), array("q", numbers)]
        # In the order of spec.SEAL_ARGUMENTS.
        arguments = array("q", (
            0, len(numbers) * place.num_heads, num_threads() if work * len(numbers) > _SERIAL_WORK else 1,
            place.num_heads, *(each.buffer_info()[0] for each in given), item * strides[1], item * strides[0],
            *place.sealed,
        ))  # fmt: skip
        program.run(arguments.buffer_info()[0])


@cache
def _program(*fields: Any) -> Any:
    """The kernel of the spec with these fields."""
    return compiled("seal", SealSpec(*fields))
