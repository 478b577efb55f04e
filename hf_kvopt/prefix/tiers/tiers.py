"""Tiers: what a prefix store knows beside what lies on the device, and the ways down and up.

    device   index and pools      evicted where room is short
    host     HostTier             a copy of every whole block of a text, up to a cap
    disk     DiskTier             likewise, in files that other processes and later ones find

    down   `spill`: behind every text that is kept, in a thread of its own
    up     `restore`: before a prompt is matched, in the thread that asks

Blocks and not layers: a block has the same number in all layers of a kind, so one record holds it in all of them, codes
and scales, centres and means together. The lock of a store is held to look, never over a copy.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kvopt.compat.ranks import text_group
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.pool.block_pieces import Piece, describe, pieces_of
from hf_kvopt.prefix.node import Node
from hf_kvopt.prefix.tiers.disk import DiskTier
from hf_kvopt.prefix.tiers.host import HostTier
from hf_kvopt.prefix.tiers.naming import DiskNames
from hf_kvopt.prefix.tiers.record import Key, Record, digests_of, layout_of
from hf_kvopt.prefix.tiers.settings import TierSettings
from hf_kvopt.prefix.tiers.spill import Spiller

if TYPE_CHECKING:
    from hf_kvopt.prefix.shared_blocks import SharedBlocks


def tiers_for(blocks: "SharedBlocks", settings: TierSettings | None) -> "Tiers | None":
    """Return the tiers of a store; None where it has none.

    Raises:
        UnsupportedModel: the model is divided over ranks, which would know unlike texts; layers hold states.
        ValueError: files without a model, whose identity they must carry.
    """
    if settings is None:
        return None
    if blocks.index.checkpoints is not None:
        raise UnsupportedModel(
            f"tiers hold blocks of keys and values, and no states: got a {type(blocks.config).__name__} with layers "
            "that hold states, without which its blocks are of no use; drop host_tier and disk_tier, or save the store "
            "to a file"
        )
    if settings.disk is not None and blocks.model is None:
        raise ValueError(
            "disk_tier needs the model, by whose weights files are told from those of others: got a store made from a "
            "config; make it from the model"
        )
    if blocks.model is not None and text_group(blocks.model) is not None:
        raise UnsupportedModel(
            f"tiers fill at their own pace, and ranks must know the same texts: got a {type(blocks.model).__name__} "
            "that is divided over ranks; drop host_tier and disk_tier"
        )
    return Tiers(blocks, settings)


class TierStats(NamedTuple):
    """Blocks that went down and came back since the store was made, and the bytes that the tiers hold now."""

    spilled: int = 0
    restored: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class Tiers:
    """The tiers of one store.

    Args:
        blocks: of the store.
        settings: how much each tier takes.
    """

    def __init__(self, blocks: "SharedBlocks", settings: TierSettings) -> None:
        self.blocks = blocks
        self.host = HostTier(settings.host_bytes) if settings.host_bytes else None
        self.disk = None if settings.disk is None else DiskTier(settings.disk, settings.disk_bytes)
        self.names = DiskNames(blocks)
        self.epoch = 0  # counts how often all was forgotten
        self.num_restored = 0
        self._forgetting = threading.Lock()
        self.spiller = Spiller(self)
        blocks.index.on_insert = self.spiller.offer

    def learn(self, key: Key) -> None:
        """Find the name by which the model of `key` is known on the disk, unless that was done."""
        if self.disk is not None:
            self.names.learn(key)

    def find(self, key: Key, text: Sequence[int], start: int) -> list[Record]:
        """Return the records of the whole blocks of a text from block `start` on, as far as they are known in a row."""
        size, epoch = self.blocks.block_size, self.epoch
        records: list[Record] = []
        digests = digests_of(text, size)
        for i, digest in enumerate(digests[start:], start):
            record = self._get(key, digest, digests, epoch)
            is_it = record is not None and record.tokens == tuple(text[i * size : (i + 1) * size])
            if record is None or not is_it:
                break
            records.append(record)
        if self.blocks.index.is_sealed:  # a text goes on behind an exact block alone
            while records and not records[-1].is_exact:
                records.pop()
        if records:
            self.touch(key, digests[start + len(records) - 1 :: -1])
        return records

    def put(self, key: Key, records: Mapping[bytes, Record], path: Sequence[bytes], epoch: int) -> None:
        """Keep copies of blocks in all tiers, unless all was forgotten since `epoch`.

        Args:
            key: of the texts.
            records: by digest, each behind those before it in its text.
            path: digests of these blocks and of all before them, the last ones of a text first.
            epoch: of the tiers, when the blocks were looked at.
        """
        # What comes first in a text is of use to most: it is the last to go, and never for what comes behind it.
        self.touch(key, path)
        kept = {name for digest in path if (name := self._path(key, digest)) is not None}
        for digest, record in records.items():
            with self._forgetting:
                if self.host is not None and epoch == self.epoch:
                    # A copy of its own: rows of one batch would keep each other.
                    self.host.put(key, digest, record._replace(data=record.data.clone()), path)
            name = self._path(key, digest)
            if self.disk is not None and name is not None:
                self.disk.put(name, record, kept, lambda: epoch == self.epoch)
        self.touch(key, path)

    def has(self, key: Key, digest: bytes, is_exact: bool) -> bool:
        """Tell whether all tiers that can hold a block have it in this form; files are not read for the answer."""
        known = None if self.host is None else self.host.get(key, digest)
        if self.host is not None and (known is None or known.is_exact < is_exact):
            return False
        name = self._path(key, digest)
        return self.host is not None if name is None else not is_exact and name.is_file()

    def touch(self, key: Key, digests: Sequence[bytes]) -> None:
        """Note a use of blocks; those named last are the last to go."""
        if self.host is not None:
            self.host.touch(key, digests)
        for digest in digests if self.disk is not None else ():
            name = self._path(key, digest)
            if self.disk is not None and name is not None:
                self.disk.touch(name)

    def forget(self) -> None:
        """Forget all texts, and remove the files of this model, whatever it is now."""
        with self._forgetting:
            self.epoch += 1
            if self.host is not None:
                self.host.clear()
        names = self.names.known()
        if self.disk is not None:
            self.disk.forget(names)

    def close(self) -> None:
        """Write what is queued and give the memory of the host back; files stay."""
        self.spiller.flush()
        if self.host is not None:
            self.host.clear()

    def stats(self) -> TierStats:
        """Count what went down and up."""
        host = 0 if self.host is None else self.host.num_bytes
        disk = 0 if self.disk is None else self.disk.num_bytes
        return TierStats(self.spiller.num_spilled, self.num_restored, host, disk)

    def pieces(self, nodes: Sequence[Node]) -> list[Piece]:
        """Return the pieces of nodes, all exact or none, in all layers; whoever calls holds the store's lock."""
        is_exact = bool(nodes) and nodes[0].is_exact
        return self.pieces_at(
            [[node.blocks[i] for node in nodes] for i in range(len(self.blocks.allocators))], is_exact
        )

    def pieces_at(self, rows: Sequence[Sequence[int]], is_exact: bool) -> list[Piece]:
        """Return the pieces of blocks in all layers, `rows[i]` being their numbers in block space i."""
        pieces = []
        for idx, pool in sorted(self.blocks.pools.items()):
            space = self.blocks.space_of(pool)
            tails = self.blocks.allocators[space].tails
            places = [tails.places[block] for block in rows[space]] if tails is not None and is_exact else []
            pieces += pieces_of(idx, pool, rows[space], places)
        return pieces

    def layout(self, is_exact: bool) -> str:
        """Return what the bytes of a block mean now; whoever calls holds the store's lock."""
        planes: dict[str, list[dict[str, Any]]] = {
            str(idx): [describe(plane) for plane in pool.planes] for idx, pool in sorted(self.blocks.pools.items())
        }
        return layout_of(planes, self.pieces([]), is_exact)

    def block_bytes(self) -> int:
        """Return the most bytes that a block takes in all layers."""
        return max(1, sum(piece.source[:1].numel() * piece.source.itemsize for piece in self.pieces([])))

    def _get(self, key: Key, digest: bytes, path: Collection[bytes], epoch: int) -> Record | None:
        record = None if self.host is None else self.host.get(key, digest)
        name = self._path(key, digest) if record is None else None
        if self.disk is not None and name is not None:
            record = self.disk.get(name)
            with self._forgetting:
                if record is not None and self.host is not None and epoch == self.epoch:
                    self.host.put(key, digest, record, path)
        return record

    def _path(self, key: Key, digest: bytes) -> Path | None:
        """Return the file of a block; None where it cannot lie on a disk."""
        names = None if self.disk is None else self.names.of(key, digest)
        return None if self.disk is None or names is None else self.disk.path(*names)
