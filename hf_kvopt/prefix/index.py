"""Prefix index: which texts lie in which blocks; a tree with one node a block, found by comparing token ids.

    root key ── [the quick brown fox] ── [jumps over the lazy] ── [dog .]      a text that ends in a half full block
                       block 7       └── [runs to the river ]     block 9      a child is looked up by its very tokens
                                                block 3

A node holds one reference to its block in each block space (layers of different kinds have tables of their own), so a
block lives while the index or a row holds it. What only the index holds is evicted from the leaves, the least recently
used first; pinned nodes stay (RadixAttention, arXiv:2312.07104). Where there are tiers below (`prefix.tiers`), blocks
that have a copy there are evicted before those that wait for it. Callers hold the allocators' lock.
"""

import heapq
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

from hf_kvopt.cache.states import RowStates
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.prefix.checkpoints import Checkpoints, found
from hf_kvopt.prefix.exact import keep_marks, lengths_to_go_on_from, read_behind
from hf_kvopt.prefix.node import Node, Tokens, covering, descendants, longest_common


class Match(NamedTuple):
    """The nodes that spell the longest known prefix; the last one may match with its first tokens only."""

    nodes: list[Node]
    length: int
    wanted: tuple[int, ...] = ()  # nodes of the text that should be exact, for others to go on from


class PrefixIndex:
    """Finds and keeps the blocks of texts.

    Args:
        allocators: one for each block space; a node has a block in each.
        block_size: tokens a block.
    """

    def __init__(self, allocators: Sequence[BlockAllocator], block_size: int) -> None:
        self.allocators, self.block_size = allocators, block_size
        self.roots: dict[Hashable, Node] = {}
        self.num_nodes = self.num_evicted = self._stamp = 0
        self._evictable: tuple[list[int], int] = ([], 0)  # the count, and what it was counted at
        # Told of the nodes of each text that was inserted, from its first block on.
        self.on_insert: Callable[[Hashable, Sequence[Node]], None] | None = None
        self.checkpoints: Checkpoints | None = None  # where layers hold states
        self._holders = [_Holder(self, idx) for idx in range(len(allocators))]
        for allocator, holder in zip(allocators, self._holders, strict=True):
            allocator.add_holder(holder)

    def match(self, key: Hashable, tokens: Sequence[int]) -> Match:
        """The longest known prefix of `tokens` that can be gone on from (see `places`); it is not held yet."""
        spelled = self.spell(key, tokens)
        return self._to_go_on_from(spelled, tokens) if self.is_sealed or self.checkpoints is not None else spelled

    def spell(self, key: Hashable, tokens: Sequence[int]) -> Match:
        """The longest known prefix of `tokens`, whether or not it can be gone on from there."""
        node, nodes, length = self.roots.get(key), [], 0
        while node is not None:
            rest = tuple(tokens[length : length + self.block_size])
            common = longest_common(node, rest)
            if common is None:
                break
            node, count = common
            nodes.append(node)
            length += count
            if count < self.block_size:
                break
        return Match(nodes, length)

    def places(self, spelled: Match, tokens: Sequence[int]) -> set[int]:
        """Lengths that `tokens` can be gone on from: all of a block exact (see `exact`), and states (`checkpoints`).

        Args:
            spelled: what `spell` returned for `tokens`.
        """
        nodes, length, size = spelled.nodes, spelled.length, self.block_size
        exact = lengths_to_go_on_from(nodes, length, size) if self.is_sealed else None
        if self.checkpoints is None:
            return set(range(length + 1)) if exact is None else exact
        held = {0, *found(nodes, tokens, length, size)}
        return held if exact is None else held & exact

    def keep_states(self, key: Hashable, tokens: Sequence[int], states: RowStates) -> None:
        """Keep what the layers with states hold behind a text that was inserted."""
        nodes, length, _ = self.spell(key, tokens)
        if nodes and length == len(tokens) and self.checkpoints is not None:
            self.checkpoints.put(nodes[-1], length - (len(nodes) - 1) * self.block_size, states)

    def states_at(self, spelled: Match, tokens: Sequence[int], length: int) -> RowStates | None:
        """Return what the layers with states hold behind the first `length` tokens; None where that is not known."""
        place = found(spelled.nodes, tokens, spelled.length, self.block_size).get(length)
        return None if place is None or self.checkpoints is None else self.checkpoints.use(*place)

    @property
    def is_sealed(self) -> bool:
        """Return whether layers of some block space seal their blocks."""
        return any(allocator.tails is not None for allocator in self.allocators)

    def _to_go_on_from(self, spelled: Match, tokens: Sequence[int]) -> Match:
        nodes, length, _ = spelled
        whole = max(self.places(spelled, tokens))
        if whole < length and self.is_sealed:
            for block in read_behind(length, self.block_size):
                nodes[block].is_wanted = True
        wanted = tuple(i for i, node in enumerate(nodes) if node.is_wanted)
        return Match(nodes[: -(-whole // self.block_size)], whole, wanted)

    def take(self, match: Match) -> list[list[int]]:
        """One row of blocks for each block space, a reference to each block being the caller's from now on."""
        self._touch(match.nodes)
        rows = [[node.blocks[idx] for node in match.nodes] for idx in range(len(self.allocators))]
        for allocator, row in zip(self.allocators, rows, strict=True):
            allocator.retain(row)
        return rows

    def insert(
        self, key: Hashable, tokens: Sequence[int], rows: Sequence[Sequence[int]], exact: Collection[int] = ()
    ) -> int:
        """Keep a text that lies in `rows` (one row for each block space); texts that are known keep their blocks.

        Where blocks are sealed, those numbered in `exact` are kept as they were computed, too.

        Returns:
            The number of blocks that were not known.
        """
        node = self.roots.setdefault(key, Node((), [], None))
        path, num_new = [], 0
        for idx in range(-(-len(tokens) // self.block_size)):
            chunk = tuple(tokens[idx * self.block_size : (idx + 1) * self.block_size])
            child = covering(node, chunk)
            if child is None:
                child = self._add(node, chunk, [row[idx] for row in rows])
                num_new += 1
            elif self.is_sealed and not child.is_exact and child.tokens == chunk:
                self._replace(child, [row[idx] for row in rows])
            path.append(child)
            node = child
        self._touch(path)
        if self.is_sealed:
            for one in path:
                one.is_exact = self._has_places(one.blocks)
            keep_marks(path, exact)
        if self.on_insert is not None:
            self.on_insert(key, path)
        return num_new

    def _has_places(self, blocks: Sequence[int]) -> bool:
        """Return whether these blocks are exact in each space that seals."""
        spaces = zip(self.allocators, blocks, strict=True)
        return all(space.tails is None or block in space.tails.places for space, block in spaces)

    def _replace(self, node: Node, blocks: list[int]) -> None:
        """Let a node have equal blocks that are exact."""
        if blocks == node.blocks or not self._has_places(blocks):
            return
        for allocator, old, new in zip(self.allocators, node.blocks, blocks, strict=True):
            allocator.retain([new])
            allocator.release([old])
        node.blocks, node.is_queued = list(blocks), False

    def evict(self, num_blocks: int) -> int:
        """Let go of up to `num_blocks` blocks that nobody else holds and nobody pinned; returns how many."""
        for allocator in self.allocators:
            allocator.reclaim()
        heap = [(node.waits, node.stamp, id(node), node) for node in self.nodes() if self._is_free(node)]
        heapq.heapify(heap)
        count = 0
        while heap and count < num_blocks:
            node = heapq.heappop(heap)[-1]
            parent = node.parent
            self._remove(node)
            count += 1
            if parent is not None and self._is_free(parent):
                heapq.heappush(heap, (parent.waits, parent.stamp, id(parent), parent))
        # Keys of models that have changed since would pile up.
        self.roots = {key: root for key, root in self.roots.items() if root.children}
        self.num_evicted += count
        return count

    def forget(self, space: int, blocks: Collection[int]) -> int:
        """Let go of the ends of texts that lie in `blocks` of a block space, unless pinned; returns how many."""
        ends = [node for node in self.nodes() if node.blocks[space] in blocks and not node.children and not node.pins]
        for node in ends:
            self._remove(node)
        self.num_evicted += len(ends)
        return len(ends)

    @property
    def num_evictable(self) -> int:
        """Return how many blocks `evict` could let go of now; counted anew where holders of blocks have changed."""
        state = [allocator.num_changes for allocator in self.allocators]
        if self._evictable[0] != state:
            # A parent can go where all below it can: children come before their parents here.
            stays: set[int] = set()
            nodes = list(self.nodes())
            for node in reversed(nodes):
                if id(node) in stays or node.pins or self.is_held(node):
                    stays |= {id(node), id(node.parent)}
            self._evictable = state, sum(id(node) not in stays for node in nodes)
        return self._evictable[1]

    def is_held(self, node: Node) -> bool:
        """Return whether somebody beside this index holds the block of a node."""
        held = zip(self.allocators, node.blocks, strict=True)
        return any(allocator.refcounts[block] > 1 for allocator, block in held)

    def pin(self, match: Match, count: int) -> None:
        """Add `count` (or take away -`count`) pins to the nodes of a match."""
        self._evictable = [], 0
        for node in match.nodes:
            node.pins = max(0, node.pins + count)

    def clear(self) -> None:
        """Forget everything, pinned or not; rows that hold blocks keep them."""
        for allocator, holder in zip(self.allocators, self._holders, strict=True):
            for row in holder.held_rows():
                allocator.release(row)
        for node in self.nodes():
            node.is_gone = True
        self.roots.clear()
        self.num_nodes = 0
        if self.checkpoints is not None:
            self.checkpoints.clear()

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        for root in self.roots.values():
            yield from descendants(root)

    def _add(self, parent: Node, tokens: Tokens, blocks: list[int]) -> Node:
        siblings = parent.children.setdefault(tokens[0], {})
        node = Node(tokens, blocks, parent)
        for known in list(siblings.values()):
            # The end of an older text that this one goes on from.
            if known.tokens == tokens[: len(known.tokens)] and not known.pins:
                if self.checkpoints is not None:
                    self.checkpoints.move(known, node)
                self._remove(known)
        # First held, then found: an interrupt between the two loses a block, and no token.
        for allocator, block in zip(self.allocators, blocks, strict=True):
            allocator.retain([block])
        parent.children.setdefault(tokens[0], {})[tokens] = node
        self.num_nodes += 1
        return node

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        del siblings[node.tokens]
        if not siblings:
            del node.parent.children[node.tokens[0]]
        node.is_gone = True
        if self.checkpoints is not None:
            self.checkpoints.drop(node)
        for allocator, block in zip(self.allocators, node.blocks, strict=True):
            allocator.release([block])
        self.num_nodes -= 1

    def _is_free(self, node: Node) -> bool:
        """A leaf that nobody but this index holds or wants to keep."""
        return not (node.parent is None or node.children or node.pins or self.is_held(node))

    def _touch(self, path: Sequence[Node]) -> None:
        self._stamp += 1
        for node in path:
            node.stamp = self._stamp


class _Holder:
    """The index as one allocator sees it: a `BlockHolder`."""

    def __init__(self, index: PrefixIndex, idx: int) -> None:
        self.index, self.idx = index, idx

    def held_rows(self) -> list[list[int]]:
        """See `BlockHolder`."""
        return [[node.blocks[self.idx]] for node in self.index.nodes()]

    def exact_blocks(self) -> list[int]:
        """Blocks that are kept as they were computed."""
        return [node.blocks[self.idx] for node in self.index.nodes() if node.is_exact]

    def renumber(self, new_ids: dict[int, int]) -> None:
        """See `BlockHolder`."""
        for node in self.index.nodes():
            node.blocks[self.idx] = new_ids[node.blocks[self.idx]]
