"""New keys or values into scattered slots of a pool on a CPU, in machine code made at first use (cpu/jit/store.py).

    pool[slot, head] = quantize(guard(states[row, head, token]))        slot -1: skipped

An unquantized pool takes states of its own dtype as they are. `can_store` says whether states can be taken;
quant/reference.py and torch's indexing take the others.
"""

from array import array
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.blocks import strided
from hf_kvopt.kernels.calls import StoreCall
from hf_kvopt.kernels.cpu.address import PoolAddress
from hf_kvopt.kernels.cpu.jit.spec import STORE_ARGUMENTS, STORE_CHUNK, StoreSpec
from hf_kvopt.kernels.cpu.program import NAMES, can_compile, compiled, lanes, num_threads
from hf_kvopt.kernels.reference import store as reference

_SOURCES = (torch.float32, torch.bfloat16, torch.float16)
# Channels below which one thread is done before a second has begun.
_SERIAL_WORK = 1 << 15
_CODES = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")
_OUTSIDE = STORE_ARGUMENTS.index("outside")


def accepts(call: StoreCall) -> bool:
    """Take calls of which at least one plane can be written; torch's operations write the other."""
    return any(_can_write(part.plane.address, part.states) for part in call.parts)


def run(call: StoreCall) -> None:
    """Write each plane; a native pool whose rows lie evenly takes one copy of torch's."""
    if call.even is not None and not [part for part in call.parts if part.plane.scale is not None]:
        for plane, _, states, _ in call.parts:
            strided(plane.codes, *call.even, states.shape[0], states.shape[2]).copy_(states)
        return
    left = []
    for part in call.parts:
        plane, _, states, centre = part
        if plane.address is None:
            left.append(part)
        else:
            store_states(states, plane.address, call.slots(), centre, plane.rotates)
    if left:
        reference.run(call._replace(parts=tuple(left)))


def _can_write(address: PoolAddress | None, states: Tensor) -> bool:
    return address is not None and can_store(states, address)


def can_store(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
    address: PoolAddress,
) -> bool:
    """Return whether `store_states` takes this call."""
    return (
        (address.code in _CODES or address.code == NAMES.get(states.dtype))
        and states.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and can_compile()
        and type(states) is Tensor
        and address.scale_bits == 16
    )


def store_states(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim] float
    address: PoolAddress,  # of a pool with as many heads, which is written
    slots: Tensor,  # [batch * tokens] int64, in any shape: block * block_size + offset, -1 to skip
    centre: Tensor | None = None,  # [batch, num_kv_heads, head_dim] float32: taken from the states
    rotates: bool = False,
) -> None:
    """Guard and quantize each vector alone, and write it; two tokens must not share a slot.

    Raises:
        ValueError: the pool has other heads, or there are not as many slots as tokens.
        IndexError: the pool has no such slot; the other tokens are written.
    """
    batch, num_heads, tokens, dim = states.shape
    if states.dtype not in _SOURCES or states.stride(3) != 1:
        states = states.float().contiguous()
    _check(states, address, slots)
    if centre is not None:
        centre = centre.float().contiguous()
    item = states.element_size()
    row, head, token, _ = states.stride()
    program = _program(dim, NAMES[states.dtype], address.code, rotates, centre is not None, lanes())
    num_slots = address.num_blocks << address.block_shift
    chunks = -(-tokens // STORE_CHUNK)
    # In the order of spec.STORE_ARGUMENTS.
    arguments = array("q", (
        0, batch * num_heads * chunks, num_threads() if states.numel() > _SERIAL_WORK else 1, -1,
        chunks, num_heads, tokens,
        states.data_ptr(), row * item, head * item, token * item,
        *((0, 0, 0) if centre is None else (centre.data_ptr(), 4 * centre.stride(0), 4 * centre.stride(1))),
        slots.data_ptr(), num_slots, address.block_shift, *address.arguments,
    ))  # fmt: skip
    program.run(arguments.buffer_info()[0])
    if arguments[_OUTSIDE] >= 0:
        raise IndexError(f"slots must lie below {num_slots}: got {arguments[_OUTSIDE]}; reserve blocks before writing")


def _check(states: Tensor, address: PoolAddress, slots: Tensor) -> None:
    batch, num_heads, tokens, dim = states.shape
    if (num_heads, dim) != (address.num_heads, address.dim):
        raise ValueError(
            f"states must have the pool's {address.num_heads} heads of {address.dim}: got {num_heads} of {dim}; "
            "use one cache a model"
        )
    if slots.dtype != torch.int64 or slots.numel() != batch * tokens or not slots.is_contiguous():
        raise ValueError(
            f"slots must be {batch * tokens} adjacent int64, one a token: got {list(slots.shape)} {slots.dtype}"
        )


@cache
def _program(*fields: Any) -> Any:
    """The kernel of the spec with these fields."""
    return compiled("store", StoreSpec(*fields))
