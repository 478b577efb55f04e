"""Lockstep: commit a verified draft one column of the whole batch at a time, as plain decoding does.

    draft     root  x_1  x_2  x_3        logits of all of them by one forward
    row 0       a ─► b ─► c ─► q         processors and criteria are called once a column, on all rows;
    row 1       p ─► q ─► r ─► s         where a row leaves the draft (here after x_2), the column is the last one

It serves processors and criteria of the caller that may count their calls, keep state or compare rows. Rows keep
equally many tokens, and finished ones read padding, so that a cache of fixed capacity can follow. A token is drawn from
the target's scores and compared with the draft, which is lossless and draws what plain decoding would draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.speculation.loop.output import Output
from hf_kvopt.speculation.loop.scores import NodeScores
from hf_kvopt.speculation.loop.tree import TreeShape


class Walk(NamedTuple):
    """Accepted part of a draft."""

    path: list[int]  # nodes that were read and stay, the root first
    tokens: list[list[int]]  # for each row, the token after each node of the path; padding for a finished row
    taken: list[list[int]]  # tokens of them that the output took


def walk(
    fed: Tensor,  # [batch, 1 + num_nodes]: the roots, and the draft
    logits: Tensor,  # [batch, 1 + num_nodes, vocab] float32
    shape: TreeShape | None,
    output: Output,
    scores: NodeScores,
    do_sample: bool,
) -> Walk:
    """Commit one token of each row a column, while the committed tokens are the drafted ones."""
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
    """Return the first of `nodes` whose tokens equal `tokens` [batch] in every row, or None."""
    return next((node for node in nodes if bool((fed[:, node] == tokens).all())), None)
