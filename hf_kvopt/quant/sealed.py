"""Seal and unseal blocks in torch: what the CPU storage uses and what the kernels are held to.

See `sealed_formats` for what is stored. Keys refer to their mean as it is stored, in float16. Sums are made in float64,
of which float32 keeps nothing of the order of summation: a block gives the same bytes whatever is sealed beside it.

NaN and Inf: a token that holds a non-finite value, or one of more than 60,000 once it is rotated, gets s = NaN and
reads back as NaN in all its channels. It has no part in what the block's other tokens share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant.guard import hadamard
from hf_kvopt.quant.sealed_formats import PARAMETER_DTYPE, BlockCodec

# Shares of a token's range that its codes may span, by bits: cutting the ends off can bring the rest nearer, the more
# the fewer codes there are.
RANGES = {
    2: (0.9, 0.78, 0.68, 0.58, 0.5),
    3: (1.0, 0.94, 0.88, 0.8, 0.72),
    4: (1.0, 0.94, 0.88, 0.8, 0.72),
    8: (1.0,),
}
LIMIT = 60_000.0  # of a channel that is no more than a number


class SealedBlocks(NamedTuple):
    """Stored blocks; `mean` is None where the codec takes none out."""

    codes: Tensor  # [n, num_kv_heads, block_size, width] uint8
    token: Tensor  # [n, num_kv_heads, block_size, num_groups] float16: s
    mean: Tensor | None  # [n, num_kv_heads, head_dim] float16


def seal(
    states: Tensor,  # [n, num_kv_heads, block_size, head_dim]
    codec: BlockCodec,
) -> SealedBlocks:
    """Return the stored form of n full blocks, each from its own tokens alone."""
    x = states.float().contiguous()
    x = hadamard(x) if codec.rotates else x
    is_sound = (x.abs() <= LIMIT).all(dim=-1, keepdim=True)  # [n, heads, block_size, 1]; False for NaN
    x = torch.where(is_sound, x, 0.0)
    mean = None
    if codec.centred:
        count = is_sound.sum(dim=2).clamp(min=1)
        mean = (x.double().sum(dim=2) / count).float().to(PARAMETER_DTYPE)
        x = x - mean.float().unsqueeze(2)
    codes, s = _token_axis(x, codec)
    return SealedBlocks(pack(codes, codec), s.masked_fill(~is_sound, torch.nan), mean)


def unseal(
    blocks: SealedBlocks,
    codec: BlockCodec,
    dim: int,
) -> Tensor:
    """Return the states that stored blocks stand for, [n, num_kv_heads, block_size, head_dim] float32."""
    x = unpack(blocks.codes, codec, dim).float().unflatten(-1, (codec.num_groups(dim), -1))
    x = ((x - codec.middle) * blocks.token.float().unsqueeze(-1)).flatten(-2)
    if blocks.mean is not None:
        x = x + blocks.mean.float().unsqueeze(2)
    return hadamard(x) if codec.rotates else x


def pack(
    codes: Tensor,  # [..., dim] of integers below 2 ** bits
    codec: BlockCodec,
) -> Tensor:
    """Return codes as bytes, [..., width] uint8."""
    codes, packed = codes.to(torch.uint8), []
    for part in codec.parts(codes.shape[-1]):
        pieces = (codes >> part.shift & (1 << part.bits) - 1).unflatten(-1, (-1, part.width))
        total = pieces[..., 0, :]
        for i in range(1, pieces.shape[-2]):
            total = total | pieces[..., i, :] << i * part.bits
        packed.append(total)
    return torch.cat(packed, dim=-1)


def unpack(
    packed: Tensor,  # [..., width] uint8
    codec: BlockCodec,
    dim: int,
) -> Tensor:
    """Return the codes, [..., dim] uint8."""
    codes = torch.zeros((*packed.shape[:-1], dim), dtype=torch.uint8, device=packed.device)
    for part in codec.parts(dim):
        stored = packed[..., part.offset : part.offset + part.width]
        pieces = [stored >> i * part.bits & (1 << part.bits) - 1 for i in range(8 // part.bits)]
        codes |= torch.cat(pieces, dim=-1) << part.shift
    return codes


def _token_axis(x: Tensor, codec: BlockCodec) -> tuple[Tensor, Tensor]:
    """Codes [..., dim] and s [..., num_groups] of vectors [..., dim], see `sealed_formats`."""
    x = x.unflatten(-1, (codec.num_groups(x.shape[-1]), -1))
    wide, reach = x.double(), x.abs().amax(dim=-1, keepdim=True) / codec.middle
    best: tuple[Tensor, ...] | None = None
    for share in RANGES[codec.bits]:
        # Where all channels are 0 any code will do.
        codes = (x / (reach * share) + codec.middle).round_().clamp_(0.0, 2 * codec.middle).nan_to_num_(0.0)
        levels = (codes - codec.middle).double()
        along = (levels * wide).sum(dim=-1, keepdim=True)
        nearness = along.square() / levels.square().sum(dim=-1, keepdim=True)
        if best is None:
            best = codes, along, nearness
        else:
            is_nearer = nearness > best[2]
            best = tuple(torch.where(is_nearer, a, b) for a, b in zip((codes, along, nearness), best, strict=True))
    assert best is not None
    codes, along, _ = best
    s = torch.where(along > 0, wide.square().sum(dim=-1, keepdim=True) / along, 0.0)
    return codes.flatten(-2), s.squeeze(-1).float().to(PARAMETER_DTYPE)
