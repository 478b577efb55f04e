"""Formats of sealed blocks: descriptors of how a block that is full becomes bytes, once, from its own tokens.

    (states[t] H)[d] ~ (code[t, d] - middle) * s[t] + m[d]      H where the codec rotates, m where it takes the mean out

middle is (2 ** bits - 1) / 2, so that codes lie evenly around 0, of which none stands for 0 itself (a mid-rise
quantizer). s is float16, one a token, KV head and group of channels. m is float16, one a block, KV head and channel:
the mean of the block's tokens. Keys lose it, as some models shift channels of theirs by many times the rest (KVQuant,
arXiv:2401.18079). The rotation spreads what is loud over all channels (QuaRot, arXiv:2404.00456), which leaves next to
nothing for a zero point to win: of SmolLM2's values it takes 4 bits from a relative squared error of 0.0086 to 0.0073,
and 2 bits in groups of 32 from 0.108 to 0.106, for one more number a group.

A token's codes are those, of a few ranges, that point most nearly in its direction, and s is chosen so that what is off
stands upright on the token x itself:

    s = <x, x> / <x, code - middle>

The s of least squared error would shorten every vector (by 11 % in 2 bits), which attention's sum over many tokens
does not average away as it does the rest; see DRIVE, arXiv:2105.08339, for such scales. On the bundled model it lost
3.4 times as much in 2-bit values, and a quarter more in 4 bits.

A row's first block is never read sealed. It holds the attention sink, whose key lies opposite to the mean of the
others, and whose error half of the attention mass would see (StreamingLLM, arXiv:2309.17453, for the sink).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

PARAMETER_DTYPE = torch.float16  # of s, z and m
# Tokens of a block that is sealed, where nobody says otherwise.
SEALED_BLOCK = 64


class Part(NamedTuple):
    """Some bits of all codes of a vector: byte j holds those of the channels j, j + width, j + 2 * width, ..."""

    bits: int  # of each code, from `shift` on
    shift: int
    offset: int  # of the part's first byte in the vector
    width: int  # bytes


@dataclass(frozen=True, kw_only=True)
class BlockCodec:
    """Codec of the keys, or of the values, of one full block.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        centred: whether the mean of the block's tokens is taken out, and stored beside the codes.
        rotates: whether vectors are multiplied with a Hadamard matrix first.
        group: channels that share the s of a token; None for all of a head. A head that it does not divide has one
            group.
    """

    bits: int
    centred: bool = False
    rotates: bool = True
    group: int | None = None

    def num_groups(self, dim: int) -> int:
        """Return the number of groups of channels with an s of their own: the float16 numbers stored for a token."""
        return dim // self.group if self.group is not None and dim % self.group == 0 else 1

    @property
    def middle(self) -> float:
        """The number halfway between the least code and the greatest."""
        return ((1 << self.bits) - 1) / 2

    def parts(self, dim: int) -> tuple[Part, ...]:
        """Return where the bits of a vector's codes lie; raises ValueError for a head size that cannot be packed."""
        found, shift, offset = [], 0, 0
        for bits in _PARTS[self.bits]:
            if dim * bits % 8:
                raise ValueError(
                    f"head_dim must be a multiple of {8 // min(_PARTS[self.bits])} for codes of {self.bits} bits: got "
                    f"{dim}; use int8, which stores one channel to a byte"
                )
            found.append(Part(bits, shift, offset, dim * bits // 8))
            shift, offset = shift + bits, offset + dim * bits // 8
        return tuple(found)

    def width(self, dim: int) -> int:
        """Return the bytes of one vector's codes."""
        return sum(part.width for part in self.parts(dim))

    def bytes_per_block(self, dim: int, block_size: int) -> int:
        """Return the bytes of one KV head of one block, all parameters included."""
        token = self.width(dim) + self.num_groups(dim) * PARAMETER_DTYPE.itemsize
        return block_size * token + (dim * PARAMETER_DTYPE.itemsize if self.centred else 0)


@dataclass(frozen=True, kw_only=True)
class SealedKV:
    """The codecs of a layer's keys and of its values."""

    k: BlockCodec
    v: BlockCodec

    @property
    def planes(self) -> tuple[BlockCodec, BlockCodec]:
        """Keys, values."""
        return self.k, self.v


def tail_blocks(
    before: int,  # tokens of the row before a step
    after: int,  # and behind it
    block_size: int,
) -> tuple[int, ...]:
    """Return the blocks of a row that are exact while it goes from `before` to `after` tokens.

    The first one, those that its queries read exact, and those to which a draft may be cut back.
    """
    if after <= 0:
        return (0,)
    last, first = (after - 1) // block_size, max(0, before // block_size - 1)
    if last - first <= _DRAFT_BLOCKS:
        return tuple(sorted({0, *range(first, last + 1)}))
    # The ends of what was there and of what comes; between them blocks are sealed from the states of the step.
    ends = range(max(0, after // block_size - 2), last + 1)
    return tuple(sorted({0, *range(first, before // block_size + 1), *ends}))


# A step of no more blocks than this keeps all of its own blocks exact until the next one, so that drafts are cut back
# without a loss; a longer one is a prompt.
_DRAFT_BLOCKS = 4
# The most that `tail_blocks` returns: of a short step the first block and all of its own, of a prompt no more.
MAX_TAIL_BLOCKS = _DRAFT_BLOCKS + 2
# How a code's bits are cut, low ones first, so that each piece divides a byte.
_PARTS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

SEALED: dict[str, SealedKV] = {
    "int4": SealedKV(k=BlockCodec(bits=4, centred=True), v=BlockCodec(bits=4)),
    "k8v4": SealedKV(k=BlockCodec(bits=8, centred=True), v=BlockCodec(bits=4)),
    "k4v2": SealedKV(k=BlockCodec(bits=4, centred=True), v=BlockCodec(bits=2, group=32)),
    "int3": SealedKV(k=BlockCodec(bits=3, centred=True), v=BlockCodec(bits=3)),
}
