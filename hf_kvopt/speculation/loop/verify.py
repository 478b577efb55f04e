"""Acceptance of drafted tokens, such that the output is what the target alone would give.

Greedy: a token is accepted if it is the target's first choice. Sampling (Leviathan et al., arXiv:2211.17192): token
x drawn from q is accepted with probability min(1, p(x) / q(x)); the first rejected one is replaced by a draw from
norm(max(p - q, 0)), and after the last accepted one a token is drawn from p. A child of a tree that was chosen, not
drawn, is a point mass: accepted with probability p(x), after which p without x, renormalised, judges its siblings
(SpecInfer, arXiv:2305.09781). `typical` is Medusa's rule (arXiv:2401.10774), which is not lossless.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.speculation.loop.tree import TreeShape

# Medusa's posterior threshold and its factor on exp(-entropy).
_TYPICAL_EPSILON, _TYPICAL_DELTA = 0.09, 0.3


class Verdict(NamedTuple):
    """Result of one verification, row by row."""

    paths: list[list[int]]  # accepted nodes, 1 for the first drafted token
    tokens: list[list[int]]  # their tokens, and the target's own token after them


def greedy_chain(tokens: Tensor, choices: Tensor, lengths: Sequence[int] | None) -> Verdict:
    """Accept drafted `tokens` [batch, gamma] while they are the target's `choices` [batch, gamma + 1]."""
    gamma = tokens.shape[1]
    if not gamma:
        return Verdict([[] for _ in choices], choices.tolist())
    # A single synchronization with the device.
    drafted, chosen = torch.cat([tokens, choices], dim=1).split([gamma, gamma + 1], dim=1)
    rows = []
    for row, (draft, choice) in enumerate(zip(drafted.tolist(), chosen.tolist(), strict=True)):
        limit = gamma if lengths is None else lengths[row]
        alpha = next((i for i in range(limit) if draft[i] != choice[i]), limit)
        rows.append(choice[: alpha + 1])
    return Verdict([list(range(1, len(row))) for row in rows], rows)


def sampled_chain(tokens: Tensor, p: Tensor, q: Tensor | None, lengths: Sequence[int] | None) -> Verdict:
    """Accept drafted `tokens` [batch, gamma] by rejection, p [batch, gamma + 1, vocab] against q [batch, gamma, vocab].

    Without q each token is a point mass. `lengths` is the number of usable tokens of each row.
    """
    batch, gamma = tokens.shape
    if not gamma:
        return Verdict([[]] * batch, torch.multinomial(p[:, 0], 1).tolist())
    ratio = p[:, :gamma].gather(2, tokens[..., None])[..., 0]
    if q is not None:
        ratio = ratio / q.gather(2, tokens[..., None])[..., 0]
    passed = torch.rand_like(ratio) < ratio
    limits = torch.full((batch,), gamma) if lengths is None else torch.tensor(lengths)
    limits = limits.to(tokens.device)
    passed &= torch.arange(gamma, device=tokens.device) < limits[:, None]
    accepted = passed.cumprod(dim=1).sum(dim=1)  # [batch]
    rows = torch.arange(batch, device=tokens.device)
    rest = p[rows, accepted]  # [batch, vocab]
    is_rejected = accepted < limits
    at = accepted.clamp(max=gamma - 1)
    taken = q[rows, at] if q is not None else F.one_hot(tokens[rows, at], p.shape[-1])
    rest = torch.where(is_rejected[:, None], (rest - taken).clamp(min=0), rest)
    last = _draw(rest, p[rows, accepted])
    listed = torch.cat([accepted[:, None], last[:, None], tokens], dim=1).tolist()
    kept = [[*row[2 : 2 + row[0]], row[1]] for row in listed]
    return Verdict([list(range(1, len(row))) for row in kept], kept)


def greedy_tree(tokens: Sequence[int], shape: TreeShape, choices: Sequence[int]) -> Verdict:
    """Accept, from the root down, the child that is the target's choice; one row."""
    node, path = 0, []
    while (child := next((c for c in shape.children[node] if tokens[c - 1] == choices[node]), None)) is not None:
        path.append(child)
        node = child
    return Verdict([path], [[tokens[c - 1] for c in path] + [choices[node]]])


def sampled_tree(tokens: Sequence[int], shape: TreeShape, p: Tensor) -> Verdict:
    """Accept children as point masses, with p [nodes, vocab] of the root and of every drafted node; one row."""
    nodes = len(shape.parents)
    index = torch.tensor([shape.parents, list(tokens[:nodes])], dtype=torch.long, device=p.device)
    listed = torch.stack([p[index[0], index[1]].double(), torch.rand(nodes, dtype=torch.double, device=p.device)])
    mass, u = listed.tolist()  # of each node's token under its parent's p, and the draw that decides on it
    node, path, refused = 0, [], []  # type: tuple[int, list[int], list[int]]
    left = 1.0  # probability left after the refused siblings
    while True:
        for child in shape.children[node]:
            token = tokens[child - 1]
            if token in refused:
                continue
            if u[child - 1] * left < mass[child - 1]:
                path.append(child)
                node, refused, left = child, [], 1.0
                break
            refused.append(token)
            left = max(left - mass[child - 1], 0.0)
        else:
            break
    rest = p[node].clone()
    rest[refused] = 0
    return Verdict([path], [[tokens[c - 1] for c in path] + _draw(rest[None], p[node][None]).tolist()])


def typical_tree(
    tokens: Sequence[int],
    shape: TreeShape,
    p: Tensor,  # [nodes, vocab]
    pick: Callable[[Tensor], Tensor],  # [1, vocab] -> [1]
) -> Verdict:
    """Accept the longest path of tokens with p >= min(epsilon, delta * exp(-entropy)); not lossless."""
    entropy = -(p * p.clamp(min=1e-9).log()).sum(dim=-1)
    least = (_TYPICAL_DELTA * (-entropy).exp()).clamp(max=_TYPICAL_EPSILON).tolist()
    best: list[int] = []
    index = torch.tensor([shape.parents, list(tokens[: len(shape.parents)])], dtype=torch.long, device=p.device)
    mass = p[index[0], index[1]].tolist()
    is_kept = [True] + [False] * len(mass)
    for node, parent in enumerate(shape.parents, start=1):
        is_kept[node] = is_kept[parent] and mass[node - 1] >= least[parent]
        if is_kept[node] and shape.depths[node] > len(best):
            best = shape.path_to(node)
    last = pick(p[best[-1] if best else 0][None])
    return Verdict([best], [[tokens[c - 1] for c in best] + last.tolist()])


def _draw(rest: Tensor, p: Tensor) -> Tensor:
    """Draw [batch] from `rest` [batch, vocab], unnormalized; from p in rows where rounding left nothing."""
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    return torch.multinomial(rest, 1)[:, 0]
