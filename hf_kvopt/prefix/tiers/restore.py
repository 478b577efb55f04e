"""Restoring: blocks of a text that the tiers know come back to the device, before a prompt is matched.

    match ─► find records ─► take blocks ─► copy ─► still the same pools? ─► insert into the index
    locked                   locked         free     locked

Blocks that are being filled belong to `_Guest`, so that nobody else takes them and counts stay right. Another thread
may let a pool grow meanwhile: then the copy went to the old tensors, and is made again.
"""

import json
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.pool.block_pieces import Piece, is_centre, is_current, put_centres, states_like
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.index import Match
from hf_kvopt.prefix.shared_blocks import SharedBlocks, device_of
from hf_kvopt.prefix.tiers.record import Key, Record, unpacked

if TYPE_CHECKING:
    from hf_kvopt.prefix.tiers.tiers import Tiers

# Copied at once: on a CPU, larger scratch would come from pages that are touched for the first time.
_PART_BYTES = 4 * 2**20


def restore(blocks: SharedBlocks, key: Hashable, texts: Sequence[Sequence[int]]) -> None:
    """Bring back what the tiers of a store know of `texts` beyond what lies on the device; where no room is, less.

    Whoever calls does not hold the store's lock.
    """
    if blocks.tiers is None or key is None:
        return
    for text in texts:
        one = Restore(blocks.tiers, key, text)
        one.find()
        with blocks.lock:
            is_any = one.take() > 0
        if is_any:
            try:
                one.fill()
            finally:
                one.leave()


def known_length(blocks: SharedBlocks, key: Hashable, text: Sequence[int]) -> int:
    """Return how many of the first tokens of a text lie on the device or in the tiers."""
    with blocks.lock:
        length = blocks.index.match(key, text).length
    if blocks.tiers is None or key is None:
        return length
    blocks.tiers.learn(key)
    start = length // blocks.block_size
    return max(length, (start + len(blocks.tiers.find(key, text, start))) * blocks.block_size)


class Restore:
    """One text on its way up: `find`, `take`, `fill`, `leave`, in this order, from any threads.

    Args:
        tiers: where it comes from.
        key: what it is filed under.
        text: tokens, of which whole blocks come back.
    """

    def __init__(self, tiers: "Tiers", key: Key, text: Sequence[int]) -> None:
        self.tiers, self.key, self.text, self.epoch = tiers, key, list(text), tiers.epoch
        self.start = 0  # first block that does not lie on the device
        self.records: list[Record] = []
        self._guest: _Guest | None = None

    @property
    def num_held(self) -> int:
        """Blocks in each block space that are held from `take` to `leave`, those that lay on the device included."""
        return 0 if self._guest is None else max(map(len, self._guest.rows), default=0)

    def find(self) -> None:
        """Read what the tiers know beyond what lies on the device; whoever calls does not hold the store's lock."""
        blocks = self.tiers.blocks
        size = blocks.block_size
        self.tiers.learn(self.key)
        with blocks.lock:
            self.start = blocks.index.match(self.key, self.text).length // size
        is_longer = len(self.text) >= (self.start + 1) * size
        self.records = self.tiers.find(self.key, self.text, self.start) if is_longer else []

    def take(self) -> int:
        """Take blocks for what was found, and return for how many; whoever calls holds the store's lock."""
        blocks = self.tiers.blocks
        size = blocks.block_size
        known = blocks.index.match(self.key, self.text).length // size
        if known > self.start:  # computed meanwhile
            self.start, self.records = known, self.records[known - self.start :]
        match = blocks.index.match(self.key, self.text[: self.start * size])
        if match.length != self.start * size:
            self.records = []
        self.records = self.records[: _readable(self.tiers, self.records)] if self.records else []
        if not self.records:
            return 0
        guest = _Guest(blocks, match)
        self.records = self.records[: guest.take(self.records)]
        if self.records:
            self._guest = guest
        else:
            guest.leave()
        return len(self.records)

    def fill(self) -> None:
        """Copy what was found to the blocks, and let the index know them; without the store's lock, as `find`."""
        assert self._guest is not None
        text = self.text[: (self.start + len(self.records)) * self.tiers.blocks.block_size]
        _fill(self.tiers, self.key, text, self.records, self._guest, self.epoch)

    def leave(self) -> None:
        """Let go of all blocks; what the index took stays."""
        if self._guest is not None:
            self._guest.leave()
            self._guest = None


class _Guest:
    """Holder of the blocks of one text while some of them are filled: a `BlockHolder`.

    Args:
        blocks: of the store, whose lock the caller holds.
        match: the first blocks of the text, which lie on the device.
    """

    def __init__(self, blocks: SharedBlocks, match: Match) -> None:
        self.blocks, self.num_known = blocks, len(match.nodes)
        self.rows = blocks.index.take(match)
        self.known_exact = {i for i, node in enumerate(match.nodes) if node.is_exact}
        self.exact: list[int] = []  # numbers of the blocks that are kept as they were computed
        self._spaces = [_Space(self, i) for i in range(len(self.rows))]
        for allocator, space in zip(blocks.allocators, self._spaces, strict=True):
            allocator.add_holder(space)

    def take(self, records: Sequence[Record]) -> int:
        """Take blocks for as many of `records` as there is room for, and return how many."""
        count = len(records)
        with self.blocks.lock:
            while count and not self._has_room(count):
                count //= 2
            for allocator, row in zip(self.blocks.allocators, self.rows, strict=True):
                row += allocator.allocate(count)
            self.exact = [self.num_known + i for i, record in enumerate(records[:count]) if record.is_exact]
            for allocator, row in zip(self.blocks.allocators, self.rows, strict=True):
                if allocator.tails is not None:
                    allocator.tails.give([row[i] for i in self.exact])
        return count

    def leave(self) -> None:
        """Let go of all blocks; what the index took stays."""
        with self.blocks.lock:
            rows, self.rows = self.rows, [[] for _ in self.rows]
            for allocator, row in zip(self.blocks.allocators, rows, strict=False):
                allocator.release(row)

    def _has_room(self, count: int) -> bool:
        try:
            for allocator in self.blocks.allocators:
                allocator.ensure_free(count)
        except OutOfBlocks:
            return False
        return True


class _Space:
    """A `_Guest` as one allocator sees it."""

    def __init__(self, guest: _Guest, idx: int) -> None:
        self.guest, self.idx = guest, idx

    def held_rows(self) -> list[list[int]]:
        """See `BlockHolder`."""
        return [self.guest.rows[self.idx]]

    def exact_blocks(self) -> list[int]:
        """Blocks that are kept as they were computed."""
        row = self.guest.rows[self.idx]
        return [row[i] for i in self.guest.exact if i < len(row)]

    def renumber(self, new_ids: dict[int, int]) -> None:
        """See `BlockHolder`."""
        row = self.guest.rows[self.idx]
        row[:] = [new_ids[block] for block in row]


def _fill(tiers: "Tiers", key: Key, text: list[int], records: list[Record], guest: _Guest, epoch: int) -> None:
    """Copy records to the blocks of `guest` and let the index know the text."""
    blocks, parts = tiers.blocks, _parts(records, guest.num_known)
    while True:
        with blocks.lock:
            if blocks.is_freed or epoch != tiers.epoch or not blocks.pools:
                return
            pieces = [
                tiers.pieces_at([[row[i] for i in part.numbers] for row in guest.rows], part.is_exact) for part in parts
            ]
        centres = [_write(some, part.records) for some, part in zip(pieces, parts, strict=True)]
        _settle(blocks)
        with blocks.lock:
            if blocks.is_freed or epoch != tiers.epoch or not blocks.pools:
                return
            now = tiers.pieces([])
            if not all(is_current(some, now) for some in pieces):
                continue  # another thread let a pool grow
            for part, some in zip(parts, centres, strict=True):
                _put_centres(blocks, guest, part.numbers, some)
            blocks.index.insert(key, text, guest.rows, {*guest.known_exact, *guest.exact})
            tiers.num_restored += len(records)
            return


class _Part(NamedTuple):
    """Blocks that are copied together, all kept exact or none."""

    is_exact: bool
    numbers: list[int]  # of the blocks in their text
    records: list[Record]


def _parts(records: Sequence[Record], first: int) -> list[_Part]:
    """Cut records, the first one of which is block `first` of its text, into parts of a few MiB."""
    at_once = max(1, _PART_BYTES // records[0].data.numel())
    parts = []
    for is_exact in (False, True):
        places = [i for i, record in enumerate(records) if record.is_exact == is_exact]
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            parts.append(_Part(is_exact, [first + i for i in some], [records[i] for i in some]))
    return parts


@torch.no_grad()
def _write(pieces: Sequence[Piece], records: Sequence[Record]) -> dict[str, Tensor]:
    """Write records to pieces, in one copy to the device; returns their centres, which are put where nobody reads."""
    rows = torch.from_numpy(np.stack([record.data.numpy() for record in records]))
    home = pieces[0].source.device
    rows = rows if home.type == "cpu" else rows.pin_memory().to(home, non_blocking=True)
    centres = {}
    for piece, tensor in zip(pieces, unpacked(pieces, rows), strict=True):
        if is_centre(piece):
            centres[piece.name] = piece.typed(tensor)
        elif len(piece.places):
            piece.write(tensor)
    return centres


def _settle(blocks: SharedBlocks) -> None:
    """Wait for the copies: others may read on streams of their own."""
    for device in {pool.keys.home for pool in blocks.pools.values()}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _put_centres(blocks: SharedBlocks, guest: _Guest, numbers: Sequence[int], tensors: dict[str, Tensor]) -> None:
    for idx, pool in blocks.pools.items() if tensors else ():
        row = guest.rows[blocks.space_of(pool)]
        put_centres(idx, pool, [row[i] for i in numbers], tensors)


def _readable(tiers: "Tiers", records: Sequence[Record]) -> int:
    """Return how many of the first records mean what the pools hold; pools are made where no forward made them yet."""
    blocks = tiers.blocks
    are_new = not blocks.pools and blocks.model is not None
    if are_new:
        _make_pools(blocks, json.loads(records[0].layout)["planes"])
    layouts = {is_exact: tiers.layout(is_exact) for is_exact in (False, True)}
    count = next((i for i, record in enumerate(records) if record.layout != layouts[record.is_exact]), len(records))
    if are_new and not count:
        blocks.pools.clear()
    return count


def _make_pools(blocks: SharedBlocks, planes: dict[str, list[dict[str, Any]]]) -> None:
    cache = PrefixSharedCache(blocks)
    cache.append_passes()
    layers: list[Any] = cache.layers
    assert blocks.model is not None
    for idx in sorted(map(int, planes)):
        pool = layers[idx].make_pool(*states_like(planes[str(idx)], device_of(blocks.model, idx)))
        blocks.keep_pool(idx, pool, layers[idx].table.allocator)
