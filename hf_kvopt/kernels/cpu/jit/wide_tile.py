"""Reads a tile of stored keys or values once, as float32, for queries that come to it again and again."""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.block_reader import BlockReader
from hf_kvopt.kernels.cpu.jit.codec import CODECS, Codec
from hf_kvopt.kernels.cpu.jit.emitter import F32
from hf_kvopt.kernels.cpu.jit.spec import TILE


def widened(codec: Codec) -> Codec:
    """Return how a tile is read once it is widened: a token's one scale still touches scores and weights instead, of
    two the numbers have theirs. Storage without scales stays as it is."""
    return CODECS["float32"]._replace(num_scales=codec.num_scales % 2, gain=codec.gain) if codec.num_scales else codec


class WideTile(BlockReader):
    """The tile that was widened last, as if it were a block of TILE tokens.

    Args:
        stored: what is widened.
        room: address of TILE * num_vectors vectors.
        num_vectors: vectors of a token's channels.
        dim: channels of a token.
    """

    def __init__(self, stored: BlockReader, room: ir.Value, num_vectors: int, dim: int) -> None:
        self.stored, self.e, self.codec = stored, stored.e, widened(stored.codec)
        self.room, self.num_vectors, self.dim = room, num_vectors, dim
        self.token = self.e.integer(num_vectors * self.e.lanes * 4)
        self.shift = self.e.integer(TILE.bit_length() - 1)

    def fill(self, first: ir.Value, stop: ir.Value) -> None:
        """Widen the tokens of a tile from `first` to `stop`."""
        e, stored = self.e, self.stored
        with e.loop(first, stop, 1) as token:
            source, target = stored.address(token), self.address(token)
            pair = stored.pair(token) if stored.codec.num_scales == 2 else None
            for i in range(self.num_vectors):
                numbers = stored.codec.load(e, source, i * e.lanes, min(e.lanes, self.dim - i * e.lanes))
                numbers = numbers if pair is None else e.fma(numbers, *pair)
                e.store(numbers, e.item(target, F32, e.integer(i * e.lanes)))

    def block_at(self, column: ir.Value) -> ir.Value:
        """Address of the tile's first token, whichever tile it is."""
        return self.room

    def scales(self, token: ir.Value) -> ir.Value:
        """See `BlockReader.scales`."""
        return self.stored.scales(token)
