"""Spiller: copies whole blocks of known texts to the tiers, in a thread that lives while there are any to copy.

    index.insert ─► queue ─► under the lock: which pieces   ─► without: read them ─► under it: still held? ─► tiers

The lock is held to look, never to copy. What the index holds is not written to, so a block that it held before and
after the copy was copied whole, also from a pool that grew meanwhile; others are dropped. The index evicts blocks that
have a copy before those that wait.
"""

import logging
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.pool.block_pieces import Piece
from hf_kvopt.prefix.node import Node
from hf_kvopt.prefix.tiers.record import Key, Record, digest_of, packed

if TYPE_CHECKING:
    from hf_kvopt.prefix.tiers.tiers import Tiers

logger = logging.getLogger(__name__)
_BATCH_BLOCKS, _BATCH_BYTES = 64, 32 * 2**20


class _Batch(NamedTuple):
    """Nodes that are copied together, as they were when their pieces were taken."""

    key: Key
    nodes: list[Node]
    held: list[list[int]]  # the blocks of each node
    is_exact: bool
    layout: str
    pieces: list[Piece]
    epoch: int

    def unchanged(self) -> list[Node]:
        """Return the nodes whose blocks the index held all the time, in the same form."""
        return [
            node
            for node, blocks in zip(self.nodes, self.held, strict=True)
            if not node.is_gone and node.blocks == blocks and node.is_exact == self.is_exact
        ]

    def records(self, rows: Tensor, kept: Sequence[Node]) -> dict[bytes, Record]:
        """Return the copies of the nodes `kept`, by their digests; `rows` are what all nodes hold."""
        own = dict(zip(map(id, self.nodes), rows, strict=True))
        return {node.digest: Record(node.tokens, self.is_exact, self.layout, own[id(node)]) for node in kept}


class Spiller:
    """The queue of one store, and the thread that empties it.

    Args:
        tiers: what it fills.
    """

    def __init__(self, tiers: "Tiers") -> None:
        self.tiers, self.num_spilled = tiers, 0
        self._queue: deque[tuple[Key, Node]] = deque()
        self._lock = threading.Lock()  # of the queue and the thread; never held while the store's lock is asked for
        self._thread: threading.Thread | None = None

    def offer(self, key: Hashable, path: Sequence[Node]) -> None:
        """Queue the whole blocks of a text that have no copy yet; whoever calls holds the store's lock."""
        size, parent = self.tiers.blocks.block_size, b""
        new = []
        for node in path:
            if len(node.tokens) < size:
                break
            node.digest = parent = node.digest or digest_of(parent, node.tokens)
            if not node.is_queued:
                node.is_queued = node.waits = True
                new.append((key, node))
        if new:
            self._start(new)

    @torch.no_grad()
    def keep_on_host(self, key: Hashable, path: Sequence[Node]) -> int:
        """Copy what the host's memory lacks of a text now, in the calling thread, which does not hold the store's lock.

        Returns:
            The bytes that were copied.
        """
        blocks, num_bytes = self.tiers.blocks, 0
        for nodes in self.tiers.missing_on_host(key, path):
            for start in range(0, len(nodes), self._limit()):
                with blocks.lock:
                    some = [node for node in nodes[start : start + self._limit()] if not node.is_gone]
                    batch = self._batch_of(key, some) if some else None
                if batch is None:
                    continue
                rows, kept = self._copied(batch)
                records = batch.records(rows, kept)
                self.tiers.put_on_host(key, records, [node.digest for node in path], batch.epoch)
                num_bytes += rows.numel()
                self.num_spilled += len(records)
        return num_bytes

    def flush(self) -> None:
        """Wait until nothing is queued; whoever calls does not hold the store's lock."""
        while (thread := self._thread) is not None:
            thread.join()

    def _start(self, new: list[tuple[Key, Node]]) -> None:
        with self._lock:
            self._queue += new
            if self._thread is None:
                # No daemon: a process that ends writes what it has queued.
                self._thread = threading.Thread(target=self._run, name="hf_kvopt tiers")
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
            try:
                self._spill()
            except Exception:
                logger.exception("a copy of known texts to the tiers failed: these blocks stay on the device alone")

    @torch.no_grad()
    def _spill(self) -> None:
        """Copy one batch from the queue."""
        blocks = self.tiers.blocks
        with blocks.lock:
            batch = self._next()
        if batch is None:
            return
        try:
            self._keep(batch, *self._copied(batch))
        finally:
            with blocks.lock:
                for node in batch.nodes:
                    node.waits = False

    def _copied(self, batch: _Batch) -> tuple[Tensor, list[Node]]:
        """Read what all nodes of a batch hold, without the store's lock; return it, and those that did not change."""
        rows = packed(batch.pieces)
        with self.tiers.blocks.lock:
            return rows, batch.unchanged()

    def _keep(self, batch: _Batch, rows: Tensor, kept: Sequence[Node]) -> None:
        depth = _depths(kept)
        path = sorted(depth, key=depth.__getitem__, reverse=True)
        self.tiers.put(batch.key, batch.records(rows, kept), path, batch.epoch)
        self.num_spilled += len(kept)

    def _next(self) -> _Batch | None:
        """Take nodes of one key and one form from the queue; None where none of them needs a copy."""
        limit = self._limit()
        nodes: list[Node] = []
        key: Key = None
        with self._lock:
            while self._queue and len(nodes) < limit:
                first, node = self._queue[0]
                if nodes and (first != key or node.is_exact != nodes[0].is_exact):
                    break
                self._queue.popleft()
                if not node.is_gone and not self.tiers.has(first, node.digest, node.is_exact):
                    key = first
                    nodes.append(node)
                else:
                    node.waits = False
        return self._batch_of(key, nodes) if nodes else None

    def _batch_of(self, key: Key, nodes: list[Node]) -> _Batch:
        """Note what nodes hold, all of which are exact or none; whoever calls holds the store's lock."""
        pieces = self.tiers.pieces(nodes)
        held, is_exact = [list(node.blocks) for node in nodes], nodes[0].is_exact
        return _Batch(key, nodes, held, is_exact, self.tiers.layout(is_exact), pieces, self.tiers.epoch)

    def _limit(self) -> int:
        """Return how many blocks are copied together."""
        return min(_BATCH_BLOCKS, max(1, _BATCH_BYTES // self.tiers.block_bytes()))


def _depths(nodes: Sequence[Node]) -> dict[bytes, int]:
    """Return the digests of nodes and of the blocks before them, each looked at once, with their depth."""
    depth: dict[bytes, int] = {}
    for node in nodes:
        path: list[bytes] = []
        at: Node | None = node
        while at is not None and at.digest and at.digest not in depth:
            path.append(at.digest)
            at = at.parent
        before = depth[at.digest] if at is not None and at.digest else 0
        depth |= {digest: before + i for i, digest in enumerate(reversed(path), 1)}
    return depth
