"""Reading: the ordered list of backends that compute an attention; the first one that accepts a call runs it.

triton      CUDA devices, and Triton's interpreter
step        one query a row over sealed blocks of fixed capacity: one opaque op, which runs this list on what it holds
sealed      layers whose full blocks are sealed: this CPU's machine code, or PyTorch's operations block by block
graph       one opaque op in a compiled graph, over rows of fixed capacity: it runs this list when the graph runs
compiled    this CPU's machine code, through the block table
codes       one query a row over quantized storage: PyTorch's operations, and nothing is dequantized
torch       PyTorch's operations over a view of the pool, or a gathered copy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels import devices
from hf_kvopt.kernels.calls import AttentionCall, EqualRows, KVSpec, KVView, Reader, Stored, TableRows
from hf_kvopt.kernels.cpu import codes, dense, sealed_tiles
from hf_kvopt.kernels.cpu import paged_attention as compiled
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.library import PATTERN, define_op
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.triton import attention as triton
from hf_kvopt.quant import format_of


def attend(call: AttentionCall) -> Tensor:
    """Compute an attention, [batch, q_len, num_heads, v_head_dim] contiguous."""
    # A CPU need not be asked for Triton at each layer of each step.
    for reader in READERS if call.q.is_cuda or devices.INTERPRET else CPU_READERS:
        if reader.accepts(call):
            return reader.run(call)
    raise AssertionError("the last backend of the list takes every call")


def _step_accepts(call: AttentionCall) -> bool:
    """Take what a step of fixed capacity reads from sealed blocks."""
    k = call.k
    if not isinstance(k, KVView) or k.plane.sealed is None or call.dropout:
        return False
    return not (torch.is_grad_enabled() and call.q.requires_grad)


def _run_step(call: AttentionCall) -> Tensor:
    """Hand what the views hold to one op, in a graph and outside of one."""
    k, v = call.k, call.v
    assert isinstance(k, KVView)
    assert isinstance(v, KVView)
    assert k.plane.sealed is not None
    assert v.plane.sealed is not None
    assert isinstance(k.rows, EqualRows)
    out: Tensor = torch.ops.hf_kvopt.attend_sealed(
        call.q, k.plane.codes, *k.plane.sealed[:3], v.plane.codes, *v.plane.sealed, *k.rows, k.spec.format,
        *call.pattern,
    )  # fmt: skip
    return out


def _graph_accepts(call: AttentionCall) -> bool:
    """Take what a compiled graph reads from blocks; dropout and gradients are torch's."""
    if not torch.compiler.is_compiling() or call.dropout or not isinstance(call.k, KVView):
        return False
    if call.k.plane.sealed is not None:
        return False
    return isinstance(call.v, KVView) and not (torch.is_grad_enabled() and call.q.requires_grad)


def _run_in_graph(call: AttentionCall) -> Tensor:
    """Hand what the views hold to one op: inside of it runs the very code that runs outside of a graph."""
    k, v = call.k, call.v
    assert isinstance(k, KVView)
    assert isinstance(v, KVView)
    assert isinstance(k.rows, EqualRows)
    out: Tensor = torch.ops.hf_kvopt.attend_fixed(
        call.q, k.plane.codes, k.plane.scale, v.plane.codes, v.plane.scale, *k.rows, k.centre,
        k.spec.shape[2], k.spec.dtype, v.spec.dtype, k.spec.rotates, k.spec.is_scattered, *call.pattern,
    )  # fmt: skip
    return out


def fixed_view(
    codes: Tensor,
    scale: Tensor | None,
    rows: EqualRows,
    kv_len: int,
    dtype: torch.dtype,
    rotates: bool = False,
    centre: Tensor | None = None,
) -> KVView:
    """Make a view of rows of a graph out of what it holds, `dtype` being what a model sees."""
    fmt = format_of(codes.dtype)
    shape = (len(rows.block_table), codes.shape[2], kv_len, codes.shape[3] * fmt.codes_per_byte)
    plane = Stored(codes, scale, rotates, address_of(codes, scale))
    spec = KVSpec(shape, dtype, fmt.name, rotates, isinstance(rows, TableRows))
    return KVView(plane, rows, spec, centre=centre)


def _attend_fixed(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    centre: Tensor | None,
    kv_len: int,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    rotates: bool,
    is_scattered: bool,
    *pattern: Any,
) -> Tensor:
    """Run the list over views made of what they hold."""
    # On a CPU it costs nothing to look; elsewhere whoever made the handle left out what is not needed.
    if centre is not None and devices.is_on_host(centre) and not bool(centre.any()):
        centre = None
    rows = (TableRows if is_scattered else EqualRows)(block_table, seq_lens)
    k = fixed_view(key_codes, key_scale, rows, kv_len, key_dtype, rotates, centre)
    v = fixed_view(value_codes, value_scale, rows, kv_len, value_dtype)
    return attend(AttentionCall(query, k, v, Pattern(*pattern)))


def _attend_fixed_fake(
    query: Tensor, key_codes: Tensor, key_scale: Tensor | None, value_codes: Tensor, *_: Any
) -> Tensor:
    batch, num_heads, q_len = query.shape[:3]
    v_dim = value_codes.shape[3] * format_of(value_codes.dtype).codes_per_byte
    return query.new_empty(batch, q_len, num_heads, v_dim)


READERS = (
    Reader("triton", triton.accepts, triton.run),
    Reader("step", _step_accepts, _run_step),
    Reader("sealed", sealed_tiles.accepts, sealed_tiles.run),
    Reader("graph", _graph_accepts, _run_in_graph),
    Reader("compiled", compiled.accepts, compiled.run),
    Reader("codes", codes.accepts, codes.run),
    Reader("torch", dense.accepts, dense.run),
)
# Without Triton; sealed blocks, which few layers have, come behind what most are read by.
CPU_READERS = tuple(READERS[i] for i in (3, 4, 1, 2, 5, 6))

define_op(
    "attend_fixed",
    "(Tensor query, Tensor key_codes, Tensor? key_scale, Tensor value_codes, Tensor? value_scale, Tensor block_table, "
    "Tensor seq_lens, Tensor? centre, SymInt kv_len, ScalarType key_dtype, ScalarType value_dtype, bool rotates, "
    "bool is_scattered, "
    f"{PATTERN}) -> Tensor",
    _attend_fixed,
    _attend_fixed_fake,
)
