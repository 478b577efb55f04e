"""Lockstep: a verified draft gone through as plain decoding goes, one column of the whole batch after the other.

    draft     root  x_1  x_2  x_3        logits of all of them by one forward
    row 0       a ─► b ─► c ─► q         processors and criteria are called once a column, on all rows, as ever;
    row 1       p ─► q ─► r ─► s         where a row leaves the draft (here behind x_2), the column is the last one

For what may count its calls, keep state or compare rows: processors and criteria of the caller. Rows keep equally many
tokens, and those that are done read padding, so that a cache of fixed capacity can follow. A token is drawn from the
target's scores and compared with the draft, which is lossless, and draws what plain decoding would draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.speculation.loop.output import Output
from hf_kvopt.speculation.loop.scores import NodeScores
from hf_kvopt.speculation.loop.tree import TreeShape


class Walk(NamedTuple):
    """How far a draft went."""

    path: list[int]  # nodes that were read and stay, the root first
    tokens: list[list[int]]  # of each row, behind each node of the path; padding where a row was done
    taken: list[list[int]]  # what the output took of them


def walk(
    fed: Tensor,  # [batch, 1 + num_nodes]: the roots, and the draft
    logits: Tensor,  # [batch, 1 + num_nodes, vocab] float32
    shape: TreeShape | None,
    output: Output,
    scores: NodeScores,
    do_sample: bool,
) -> Walk:
    """Commit one token a row and column, as long as what is committed was drafted."""
    path: list[int] = [0]
    taken: list[list[int]] = [[] for _ in fed]
    first = output.width
    while True:
        node, columns = path[-1], output.width
        behind = logits[:, node].clone()
        step = scores.lockstep(output.ids[:, :columns], behind)
        for row in range(len(fed)):
            output.record(row, step[row][None], behind[row][None])
        tokens = torch.multinomial(torch.softmax(step, dim=-1), 1)[:, 0] if do_sample else step.argmax(dim=-1)
        for row, new in enumerate(output.commit(tokens[:, None].tolist())):
            taken[row] += new
        drafted = None if not output.active else _match(fed, output.ids[:, columns], _children(node, shape, fed))
        if drafted is None:
            break
        path.append(drafted)
    return Walk(path, output.ids[:, first : first + len(path)].tolist(), taken)


def _children(node: int, shape: TreeShape | None, fed: Tensor) -> Sequence[int]:
    if shape is not None:
        return shape.children[node]
    return [node + 1] if node + 1 < fed.shape[1] else []


def _match(fed: Tensor, tokens: Tensor, nodes: Sequence[int]) -> int | None:
    """The node of `nodes` at which every row was fed its one of `tokens` [batch]."""
    return next((node for node in nodes if bool((fed[:, node] == tokens).all())), None)
