"""Address of a pool in memory, as the compiled kernels of a CPU take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.cpu.program import MAX_DIM, NAMES
from hf_kvopt.quant import format_of

_MIN_BLOCK = 16  # a unit of keys lies in one block


class PoolAddress(NamedTuple):
    """Address of a pool, as the kernel takes it; holds as long as the pool's tensors stay."""

    arguments: tuple[int, ...]  # address and strides in bytes: of blocks, tokens and heads, of scales' blocks and heads
    code: str  # how it is stored, a name in decoder.CODECS
    dim: int
    scale_bits: int
    num_heads: int
    num_blocks: int
    block_shift: int


def address_of(
    codes: Tensor,  # [num_blocks, block_size, num_kv_heads, width]
    scale: Tensor | None,  # [num_blocks, block_size, num_kv_heads, *scale_shape]
) -> PoolAddress | None:
    """Return where this pool lies; None where the kernel cannot read it."""
    num_blocks, block_size, num_heads, width = codes.shape
    is_power = block_size >= _MIN_BLOCK and not block_size & (block_size - 1)
    if codes.device.type != "cpu" or type(codes) is not Tensor or not is_power or not _is_readable(codes, scale):
        return None
    item = codes.element_size()
    block, token, head, _ = codes.stride()
    arguments = codes.data_ptr(), block * item, token * item, head * item
    bits, dim = 16, width * format_of(codes.dtype).codes_per_byte
    scales = 0, 0, 0
    if scale is not None:
        bits = 8 * scale.element_size()
        scales = scale.data_ptr(), scale.stride(0) * bits // 8, scale.stride(2) * bits // 8
    shift = block_size.bit_length() - 1
    return PoolAddress((*arguments, *scales), NAMES[codes.dtype], dim, bits, num_heads, num_blocks, shift)


def _is_readable(codes: Tensor, scale: Tensor | None) -> bool:
    """Return whether a token's channels, and the scales of a block's tokens, lie beside one another."""
    if codes.dtype not in NAMES or codes.shape[3] > MAX_DIM or codes.stride(3) != 1:
        return False
    if scale is None:
        return True
    is_packed = scale.stride(1) == 1 if scale.dim() == 3 else scale.stride()[1::2] == (scale.shape[3], 1)
    return is_packed and scale.dtype in (torch.float16, torch.float32)
