"""Attention of a few queries over sealed and exact blocks on a CPU, in machine code made at first use.

Both forms are read where they lie, in one pass and without a dequantized copy (cpu/jit/sealed.py). A step of many
queries finds its own tokens in no exact block, and takes the torch path.
"""

from array import array
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.cpu.jit.spec import CHUNK, SealedSpec, part_items
from hf_kvopt.kernels.cpu.paged_attention import (
    MAX_QUERY_BYTES,
    QUERY_DTYPES,
    SERIAL_WORK,
    pattern_arguments,
    scratch,
)
from hf_kvopt.kernels.cpu.program import can_compile, compiled, lanes, num_threads
from hf_kvopt.kernels.cpu.sealed_place import SealedPlace
from hf_kvopt.kernels.pattern import Pattern


class SealedRows(NamedTuple):
    """The rows of a batch: which blocks, and where those that are exact lie."""

    block_table: Tensor  # [batch, max_blocks] int32
    exact_table: Tensor  # [batch, max_blocks] int32, places
    seq_lens: Tensor  # [batch] int32
    lags: Tensor | None  # [batch] int32
    skip: int  # see `attend_blocks`
    first_block: int  # number of the table's first block in its row: more than 0 behind a window


def can_attend_sealed(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: SealedPlace,
    v: SealedPlace,
) -> bool:
    """Return whether `attend_sealed_blocks` takes this call, all of whose blocks that are to be exact are."""
    if not can_compile() or k.codec.num_groups(k.dim) != 1:
        return False
    if type(q) is not Tensor or q.device.type != "cpu" or (q.requires_grad and torch.is_grad_enabled()):
        return False
    batch, num_heads, q_len, head_dim = q.shape
    group_bytes = 8 * num_heads // k.num_heads * q_len * head_dim  # queries in two forms
    return q.dtype in QUERY_DTYPES and batch > 0 and 0 < group_bytes <= MAX_QUERY_BYTES


def attend_sealed_blocks(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: SealedPlace,
    v: SealedPlace,
    rows: SealedRows,
    pattern: Pattern,
    depths: Tensor | None = None,  # [q_len] int32
) -> Tensor:
    """Attention with queries aligned to the end of each row, each reading what its position says.

    The pattern is that of `attend_blocks`. `depths` say by how much each query's position is behind that of the first,
    where that is not its number: nodes of a tree of drafts.

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, in q's dtype; 0 for a query that may see no token.
    """
    batch, num_heads, q_len, head_dim = q.shape
    group = num_heads // k.num_heads
    num_queries = group * q_len
    together = min(num_queries, 4)
    program, part_size = _program(together, k.dim, v.dim, k.code, v.code, k.codec, v.codec, k.block_size, lanes())
    states = q if q.dtype == torch.float32 and q.stride(3) == 1 else q.float().contiguous()
    shift = k.block_size.bit_length() - 1
    capacity = rows.block_table.shape[1] << shift
    splits = -(-capacity // CHUNK)
    num_tasks = batch * k.num_heads * splits
    out = states.new_empty((batch, q_len, num_heads, v.dim))
    padded = -(-num_queries // together) * together
    parts = scratch(num_tasks * padded * part_size)
    work = batch * num_heads * q_len * capacity * (head_dim + v.dim)
    before, behind, held = pattern_arguments(pattern)
    # In the order of spec.ARGUMENTS and spec.SEALED_ARGUMENTS.
    arguments = array("q", (
        0, num_tasks, num_threads() if work > SERIAL_WORK else 1, splits, k.num_heads, group, q_len, padded,
        states.data_ptr(), *states.stride()[:3],
        *k.exact, *v.exact,
        rows.block_table.data_ptr(), rows.block_table.stride(0), shift, rows.seq_lens.data_ptr(),
        before, 0 if rows.lags is None else rows.lags.data_ptr(), rows.skip,
        0, 1, *behind,
        out.data_ptr(), parts.data_ptr(),
        rows.exact_table.data_ptr(), rows.exact_table.stride(0), rows.first_block,
        0 if depths is None else depths.data_ptr(),
        *k.sealed, *v.sealed,
    ))  # fmt: skip
    program.run(arguments.buffer_info()[0])
    del held
    return out if q.dtype == torch.float32 else out.to(q.dtype)


@cache
def _program(*fields: Any) -> tuple[Any, int]:
    """The kernel of the spec with these fields, and the float32 values of scratch that a task takes for a row."""
    spec = SealedSpec(*fields)
    return compiled("sealed", spec), part_items(spec)
