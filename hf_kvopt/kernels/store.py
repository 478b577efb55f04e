"""Writing: the ordered list of backends that store new keys and values in their blocks.

    op          Triton's kernel where it runs, and one opaque op in a compiled graph
    compiled    this CPU's machine code
    torch       everything else

Layers whose full blocks are sealed have a list of their own, `SEALERS`: Triton's kernels where they run. Elsewhere
`pool.sealed` does it.

`KVPool` asks the list when it is made, and again only for states that are no plain tensors or come in a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.errors import KVOptError
from hf_kvopt.kernels.calls import PlaneWrite, StoreCall, Stored, Writer
from hf_kvopt.kernels.cpu import store as compiled
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.library import define_op
from hf_kvopt.kernels.reference import store as reference
from hf_kvopt.kernels.sealed_kv import BothForms, SealCall
from hf_kvopt.kernels.triton import store_kv as triton_store
from hf_kvopt.kernels.triton.seal_blocks import can_seal, seal_blocks
from hf_kvopt.quant import format_of, guarded

_STORE_KV = (
    "(Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slot_mapping, Tensor(c!)? k_scale=None, "
    "Tensor(d!)? v_scale=None) -> ()"
)


def writer_for(call: StoreCall) -> Writer:
    """Return the first backend that takes calls like this one."""
    return next(writer for writer in WRITERS if writer.accepts(call))


def sealer_for(call: SealCall) -> Sealer | None:
    """Return the first backend that takes calls like this one; None where storage has to do it by itself."""
    for sealer in SEALERS:
        if sealer.accepts(call):
            return sealer
    return None


def store_kv(
    k: Tensor,  # [batch, num_kv_heads, q_len, k_dim], last axis contiguous
    v: Tensor,  # [batch, num_kv_heads, q_len, v_dim]
    k_pool: Tensor,  # [num_blocks, block_size, num_kv_heads, k_dim or packed], written in place
    v_pool: Tensor,
    slot_mapping: Tensor,  # [batch * q_len] int64: block * block_size + offset, -1 to skip
    k_scale: Tensor | None = None,  # [num_blocks, block_size, num_kv_heads, *scale_shape] float16 or float32
    v_scale: Tensor | None = None,
) -> None:
    """Quantize (the pools' dtypes say how) and scatter new keys and values into their slots."""
    torch.ops.hf_kvopt.store_kv(k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale)


def store_plane(
    states: Tensor,  # [batch, num_kv_heads, tokens, dim]
    pool: Tensor,  # [num_blocks, block_size, num_kv_heads, dim or packed], written in place
    scale: Tensor | None,
    slot_mapping: Tensor,  # [batch * tokens] int64, -1 to skip
) -> None:
    """Quantize and scatter keys or values without Triton, outside of a graph."""
    plane = Stored(pool, scale, address=address_of(pool, scale))
    call = StoreCall((PlaneWrite(plane, format_of(pool.dtype), states),), lambda: slot_mapping)
    (_COMPILED if compiled.accepts(call) else _TORCH).run(call)


def _op_accepts(call: StoreCall) -> bool:
    """Take keys and values together, where Triton runs or a graph is being compiled."""
    return len(call.parts) == 2 and (torch.compiler.is_compiling() or runs_kernel(call.parts[0].states))


def _run_op(call: StoreCall) -> None:
    """Guard keys, and hand all to the op."""
    keys, values = call.parts
    k, v = guarded(keys.states, keys.plane.rotates, keys.centre), values.states
    k, v = k if k.stride(-1) == 1 else k.contiguous(), v if v.stride(-1) == 1 else v.contiguous()
    slots = call.slots().reshape(-1)
    store_kv(k, v, keys.plane.codes, values.plane.codes, slots, keys.plane.scale, values.plane.scale)


def _store_kv_impl(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise KVOptError("hf_kvopt::store_kv has no gradient: got states that require one; call under torch.no_grad()")
    if runs_kernel(k):
        triton_store.store_kv(k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale)
        return
    store_plane(k, k_pool, k_scale, slot_mapping)
    store_plane(v, v_pool, v_scale, slot_mapping)


class Sealer(NamedTuple):
    """A backend that writes exact states, and seals the blocks that are full."""

    name: str
    accepts: Callable[[SealCall], bool]
    run: Callable[[SealCall], None]


def _triton_seals(call: SealCall) -> bool:
    """Take what the kernel can quantize, on a device that runs it."""
    k, v = call.k, call.v
    return runs_kernel(k.exact) and can_seal(k.codec, k.dim) and can_seal(v.codec, v.dim)


def _run_triton(call: SealCall) -> None:
    """Write the states, and seal from them or from exact places."""
    k, v = _with_contiguous(call.k), _with_contiguous(call.v)
    assert k.new is not None
    assert v.new is not None
    store_kv(k.new, v.new, k.exact, v.exact, call.slots().reshape(-1))
    if call.full is not None:
        seal_blocks(k, v, call.full())


def _with_contiguous(x: BothForms) -> BothForms:
    return x if x.new is None or x.new.stride(-1) == 1 else x._replace(new=x.new.contiguous())


SEALERS = (Sealer("triton", _triton_seals, _run_triton),)
_COMPILED = Writer("compiled", compiled.accepts, compiled.run)
_TORCH = Writer("torch", reference.accepts, reference.run)
WRITERS = (Writer("op", _op_accepts, _run_op), _COMPILED, _TORCH)

define_op("store_kv", _STORE_KV, _store_kv_impl, lambda *_: None)
