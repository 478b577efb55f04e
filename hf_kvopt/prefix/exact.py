"""Places from which a text can be gone on, in a store whose full blocks are sealed.

    text      [0: exact][1][2]...[k-2][k-1: exact][k: exact, half full]
    lengths   1 ... block_size            k * block_size ... (all of block k that is known)

A token reads its row's first block and the two newest ones exact. So a known text is of use up to a length behind
which these lie in the store as they were computed: at the ends of filed texts, and where a later text was seen to part
from one. A match is rounded down to such a length.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_kvopt.prefix.node import Node


def lengths_to_go_on_from(nodes: "Sequence[Node]", length: int, block_size: int) -> set[int]:
    """The lengths up to `length` that a text, which lies in `nodes`, can be gone on from."""
    found = {0}
    if not nodes or not nodes[0].is_exact:
        return found
    for i, node in enumerate(nodes):
        first, stop = i * block_size, (i + 1) * block_size
        if node.is_exact and (not i or nodes[i - 1].is_exact):
            found.update(range(first + 1, min(length, stop) + 1))
        elif node.is_exact and stop <= length:
            found.add(stop)
    return found


def read_behind(length: int, block_size: int) -> tuple[int, ...]:
    """The blocks, but for the first, that the next token of a text of this length reads exact."""
    last = length // block_size
    return tuple(block for block in ((last - 1, last) if length % block_size else (last - 1,)) if block > 0)


def keep_marks(path: "Sequence[Node]", kept: Collection[int]) -> None:
    """Let go of the exact form of nodes of one text but for the first, those numbered in `kept` and beside branches."""
    for i, node in enumerate(path):
        parent = node.parent
        is_branch = node.num_children > 1 or (parent is not None and parent.num_children > 1)
        node.is_exact = node.is_exact and (i == 0 or i in kept or is_branch)


def columns_in_common(pads: Sequence[int], lengths: Sequence[set[int]]) -> int:
    """The greatest column up to which each row, behind its `pads`, holds one of its `lengths`."""
    candidates = {pad + n for pad, some in zip(pads, lengths, strict=True) for n in some}
    rows = list(zip(pads, lengths, strict=True))
    return max(
        (column for column in candidates if all(column <= pad or column - pad in some for pad, some in rows)),
        default=0,
    )
