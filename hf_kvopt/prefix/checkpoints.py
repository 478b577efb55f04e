"""Checkpoints: what the layers with states held behind some of the tokens of known texts.

    text          [the quick brown fox][jumps over the lazy][dog .]
    keys          a block a node: any number of first tokens can be taken
    states                           ^ 4                        ^ 10     a text is gone on from one of these lengths

States sum up a text, so a known prefix is of use up to its last checkpoint alone. Kept are the end of each prompt, less
the tokens that open the answer, the place where texts part, and the end of each answer (Marconi, arXiv:2411.19379). The
least recently used ones go where they would take more than their share of bytes; those of a node go with it.
"""

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from hf_kvopt.cache.states import RowStates, num_bytes
from hf_kvopt.prefix.node import Node

logger = logging.getLogger(__name__)


class Checkpoints:
    """States of all nodes of one index; `Node.states` lists those of a node by how many of its tokens they have read.

    Args:
        limit: returns the most bytes that are kept.

    Callers hold the store's lock. States are read only, and shared by whoever is given them.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._used: OrderedDict[tuple[Node, int], None] = OrderedDict()  # the least recently used ones first
        self.num_bytes = self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._used)

    def put(self, node: Node, count: int, states: RowStates) -> None:
        """Keep what is held behind the first `count` tokens of `node`, unless that is known or there is no room."""
        if count in node.states:
            self._used.move_to_end((node, count))
            return
        size = num_bytes(states)
        if self._make_room(size):
            node.states[count] = states
            self._used[node, count] = None
            self.num_bytes += size

    def use(self, node: Node, count: int) -> RowStates:
        """Return the states behind the first `count` tokens of `node`."""
        self._used.move_to_end((node, count))
        return node.states[count]

    def drop(self, node: Node) -> None:
        """Forget the states of a node that goes."""
        for count in [*node.states]:
            self._forget(node, count)

    def move(self, old: Node, new: Node) -> None:
        """Let `new`, which begins with all tokens of `old`, have its states."""
        for count, states in [*old.states.items()]:
            self._forget(old, count)
            self.put(new, count, states)

    def clear(self) -> None:
        """Forget all states."""
        for node, _ in self._used:
            node.states = {}
        self._used.clear()
        self.num_bytes = 0

    def _make_room(self, size: int) -> bool:
        """Return whether `size` more bytes may be kept, those of the least recently used states being let go of."""
        limit = self._limit()
        if size > limit:
            _say_once(size, limit)
            return False
        for node, count in [*self._used]:
            if self.num_bytes + size <= limit:
                break
            if not node.pins:
                self._forget(node, count)
                self.num_evicted += 1
        return self.num_bytes + size <= limit

    def _forget(self, node: Node, count: int) -> None:
        self.num_bytes -= num_bytes(node.states.pop(count))
        del self._used[node, count]


def found(nodes: Sequence[Node], text: Sequence[int], length: int, block_size: int) -> dict[int, tuple[Node, int]]:
    """Return where the states behind the first tokens of a text lie, by the number of these tokens.

    Args:
        nodes: that spell the text, up to `length` tokens.
    """
    places: dict[int, tuple[Node, int]] = {}
    for i, node in enumerate(nodes):
        rest = tuple(text[i * block_size : min(length, (i + 1) * block_size)])
        assert node.parent is not None
        # Beside the node that spells most of the text there may be others that end, or part from it, before.
        for sibling in node.parent.children.get(rest[0], {}).values() if rest else ():
            for count in sibling.states:
                if count <= len(rest) and sibling.tokens[:count] == rest[:count]:
                    places[i * block_size + count] = sibling, count
    return places


@functools.cache
def _say_once(size: int, limit: int) -> None:
    logger.warning(
        "the states of one text take %d bytes, more than the %d that a prefix store keeps of states: no prompt is "
        "found again; make the store with a larger state_limit, or max_tokens",
        size,
        limit,
    )
