"""Keys and values of a batch in sealed and exact blocks, as one frozen value that the sealed attention ops take.

Token j of a row is slot j % block_size of its block j // block_size: block_table says where that lies sealed,
exact_table where it lies exact, if it does. A query in block i reads blocks 1 to i - 2 sealed and all others exact;
numbers of blocks count from the row's first token, which need not be held (`first_block`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant.guard import hadamard
from hf_kvopt.quant.sealed_formats import BlockCodec


class BothForms(NamedTuple):
    """Keys or values of one layer in both forms; see `pool.sealed`."""

    codes: Tensor  # [num_blocks, block_size, num_kv_heads, width] uint8
    token: Tensor  # [num_blocks, block_size, num_kv_heads, num_groups] float16, s
    mean: Tensor | None  # [num_blocks, num_kv_heads, dim] float16
    exact: Tensor  # [places, block_size, num_kv_heads, dim]
    codec: BlockCodec
    new: Tensor | None = None  # [batch, num_kv_heads, tokens, dim] states of the last tokens, where they are at hand

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.exact.shape[3]


class SealedKV(NamedTuple):
    """View of what a layer holds of a batch of rows."""

    k: BothForms
    v: BothForms
    block_table: Tensor  # [batch, max_blocks] int32
    exact_table: Tensor  # [batch, max_blocks] int32, places
    seq_lens: Tensor  # [batch] int32, tokens that the tables hold, new ones included
    first_block: int = 0  # of the row that the tables begin with
    depths: Tensor | None = None  # [q_len] int32: each query's position less the first one's, where not its number

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a token."""
        return self.v.exact.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.v.exact.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a row's table can hold."""
        return self.block_table.shape[1] * self.block_size


class Full(NamedTuple):
    """Blocks to seal, [num_blocks] each; `places` is -1 for a block that lies in the states of the step alone."""

    blocks: Tensor  # int64 numbers
    places: Tensor  # int64 in the exact storage
    rows: Tensor  # int64 of the batch
    firsts: Tensor  # int64 column of the states that holds the block's first token


class SealCall(NamedTuple):
    """New keys and values of a layer, where they go, and the blocks that become full by them."""

    k: BothForms  # `new` are the states, [batch, num_kv_heads, tokens, dim]
    v: BothForms
    slots: Callable[[], Tensor]  # gives [batch * tokens] int64 of the exact storage in any shape, -1 to skip
    full: Callable[[], Full] | None  # None where no block becomes full


class Turning(NamedTuple):
    """The matrix by which a codec turns vectors: `signs` times `scale`, symmetric and its own inverse."""

    signs: Tensor  # [dim, dim] int8: -1, 0 and 1
    scale: float


@cache
def turning(dim: int, rotates: bool, device: torch.device) -> Turning:
    """Return the matrix for a head size; the identity where the codec does not rotate."""
    with torch.inference_mode(False):
        matrix = torch.eye(dim)
        matrix = hadamard(matrix) if rotates else matrix
        return Turning(matrix.sign().to(torch.int8).to(device), float(matrix.abs().max()))


class SealedStep(NamedTuple):
    """Tells a step on the device what lies beside the codes of sealed blocks.

    Args:
        token: [num_blocks, block_size, num_kv_heads, num_groups] float16.
        means: [num_blocks, num_kv_heads, dim] float16; None where none is taken out.
        exact: [places, block_size, num_kv_heads, dim].
        exact_table: [batch, max_blocks] int32, places.
        lags: [batch] int64, columns before each row's first token.
    """

    token: Tensor
    means: Tensor | None
    exact: Tensor
    exact_table: Tensor
    lags: Tensor
