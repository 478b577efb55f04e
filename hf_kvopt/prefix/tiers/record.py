"""Record: one block of a text outside of the device, and the digests by which records are found.

    digest of block i    SHA-256(digest of block i - 1, tokens of block i)      so a block stands for all before it

`data` is the block in all layers, piece behind piece, in the order of `pool.block_pieces`; `layout` says which.
"""

import hashlib
import json
from array import array
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_kvopt.pool.block_pieces import Piece
from hf_kvopt.prefix.node import Tokens

Key = Hashable
"""What texts are filed under in this process, see `SharedBlocks.key_of`."""


class Record(NamedTuple):
    """One block: its tokens and bytes."""

    tokens: Tokens
    is_exact: bool  # whether it is kept as it was computed, too; see `prefix.exact`
    layout: str
    data: Tensor  # [bytes] uint8 on the host


def digest_of(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of a text that goes on with the block `tokens` behind the text of `parent`."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


def digests_of(text: Sequence[int], block_size: int) -> list[bytes]:
    """Return the digests of the whole blocks of a text, from the first one on."""
    digests, last = [], b""
    for start in range(0, len(text) - block_size + 1, block_size):
        last = digest_of(last, text[start : start + block_size])
        digests.append(last)
    return digests


def packed(pieces: Sequence[Piece]) -> Tensor:
    """Return the blocks of `pieces`, all of equally many, as bytes [n, bytes] on the host: one copy from the device."""
    parts = [piece.read() for piece in pieces if len(piece.places)]
    if parts[0].device.type == "cpu":
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts], axis=1))
    return torch.cat(parts, dim=1).cpu()


def unpacked(
    pieces: Sequence[Piece],
    data: Tensor,  # [n, bytes] as `packed` returned it
) -> list[Tensor]:
    """Return the bytes of each piece, by reference."""
    parts, start = [], 0
    for piece in pieces:
        width = piece.bytes_per_block if len(piece.places) else 0
        parts.append(data[: len(piece.places), start : start + width])
        start += width
    return parts


def layout_of(planes: Mapping[str, object], pieces: Sequence[Piece], is_exact: bool) -> str:
    """Return what the bytes of a block mean, as text that is the same in every process."""
    kept = [
        [piece.name, str(piece.source.dtype), *piece.source.shape[1:]]
        for piece in pieces
        if is_exact or not piece.name.endswith(" exact")
    ]
    return json.dumps({"planes": planes, "pieces": kept}, sort_keys=True)
