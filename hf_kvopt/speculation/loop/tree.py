"""Trees of drafted tokens: node 0 is the root of a row, node 1 + i the i-th drafted token; parents come first.

root ─ a ─ c         parents of (a, b, c, d): (-1, -1, 0, 0)
     │   └ d         paths: a, ac, ad, b
     └ b             one forward verifies all of them, each node seeing its ancestors alone (SpecInfer, 2305.09781)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TreeShape(NamedTuple):
    """Structure of one row's tree; node 0 is the root."""

    parents: list[int]  # for nodes 1, 2, ...: index of the parent node; entry 0 belongs to node 1
    depths: list[int]  # for nodes 0, 1, ...
    children: list[list[int]]  # for nodes 0, 1, ...

    def path_to(self, node: int) -> list[int]:
        """Return the nodes from below the root down to `node`; empty for the root."""
        path = []
        while node:
            path.append(node)
            node = self.parents[node - 1]
        return path[::-1]


def shape_of(parents: Sequence[int], num_nodes: int) -> TreeShape:
    """Return the shape of the first `num_nodes` nodes; `parents` number drafted tokens from 0 and the root as -1.

    Raises:
        ValueError: a parent does not come before its child.
    """
    above = [parent + 1 for parent in parents[:num_nodes]]
    depths, children = [0], [[] for _ in range(num_nodes + 1)]  # type: tuple[list[int], list[list[int]]]
    for node, parent in enumerate(above, start=1):
        if not 0 <= parent < node:
            raise ValueError(f"parents of a draft tree must come before their children: got {list(parents)}")
        depths.append(depths[parent] + 1)
        children[parent].append(node)
    return TreeShape(above, depths, children)


def ancestor_mask(shape: TreeShape) -> Tensor:
    """Return [nodes, nodes] bool, root included: True where the row's node is the column's or descends from it."""
    num_nodes = len(shape.depths)
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
    mask[0, 0] = True
    for node, parent in enumerate(shape.parents, start=1):
        mask[node] = mask[parent]
        mask[node, node] = True
    return mask
