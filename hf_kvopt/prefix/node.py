"""Node of a prefix tree: one block of a text, and how the children of a node are told apart by their tokens."""

from collections.abc import Iterator

from hf_kvopt.cache.states import RowStates
from hf_kvopt.prefix.texts import common_prefix

Tokens = tuple[int, ...]


class Node:
    """One block of a text: `tokens` fill it, or its first slots where the text ends in it."""

    __slots__ = (
        "blocks", "children", "digest", "is_exact", "is_gone", "is_queued", "is_wanted", "parent", "pins", "stamp",
        "states", "tokens", "waits",
    )  # fmt: skip

    def __init__(self, tokens: Tokens, blocks: list[int], parent: "Node | None") -> None:
        self.tokens, self.blocks, self.parent = tokens, blocks, parent
        # By first token, then by all: a match inside a block looks at few siblings.
        self.children: dict[int, dict[Tokens, Node]] = {}
        self.stamp = self.pins = 0
        # Where layers hold states: what they held behind the first n tokens of this node; see `prefix.checkpoints`.
        self.states: dict[int, RowStates] = {}
        # Where blocks are sealed: whether this one is kept as it was computed, and whether a text that parts from this
        # one would need it so.
        self.is_exact = self.is_wanted = False
        # Where there are tiers below: the digest of the text up to here, whether this node was queued for a copy and
        # still waits for it, and whether it was let go of meanwhile.
        self.digest = b""
        self.is_queued = self.waits = self.is_gone = False

    @property
    def num_children(self) -> int:
        """Nodes that go on from here."""
        return sum(map(len, self.children.values()))


def descendants(root: Node) -> Iterator[Node]:
    """All nodes below `root`, parents before children."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not root:
            yield node
        stack += [child for siblings in node.children.values() for child in siblings.values()]


def longest_common(node: Node, rest: Tokens) -> tuple[Node, int] | None:
    """The child that shares most of its first tokens with `rest`, and how many; None where none shares any."""
    siblings = node.children.get(rest[0], {}) if rest else {}
    if rest in siblings:
        return siblings[rest], len(rest)
    shared = [(common_prefix(child.tokens, rest), child) for child in siblings.values()]
    if not shared:
        return None
    count, child = max(shared, key=lambda pair: (pair[0], pair[1].is_exact))
    return child, count


def covering(node: Node, chunk: Tokens) -> Node | None:
    """The child that holds all of `chunk`, and maybe more behind it."""
    siblings = node.children.get(chunk[0], {})
    if chunk in siblings:
        return siblings[chunk]
    return next((child for child in siblings.values() if child.tokens[: len(chunk)] == chunk), None)
