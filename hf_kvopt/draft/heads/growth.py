"""How drafts grow: chains token by token, trees level by level, both only as far as the head believes in them.

The joint probability of a node, the product of q along its path, estimates how likely the target accepts it. A chain
ends where it falls below `Plan.min_confidence`. A tree is EAGLE-2's: each level expands its `top_k` best nodes by
`top_k` children, and the `num_nodes` best of all levels are the draft. A parent is never less likely than its child,
so what is kept is a tree.

Source: EAGLE-2, arXiv:2406.16858, section 4.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.draft.drafter import Draft, Plan, Sampler
from hf_kvopt.draft.heads.base import HeadBase


class ChainGrowth:
    """Owns the tokens of one chain a row.

    Arg max tokens that the head does not believe in are left out. A drawn one stays and the chain ends behind it: to
    drop tokens by their value would change the distribution that the others are drawn from.
    """

    def __init__(self, head: HeadBase, batch_size: int, min_confidence: float, sample: Sampler) -> None:
        self._head, self._sample = head, sample
        self._limit = log(min_confidence) if min_confidence > 0 else None
        self._joint = [0.0] * batch_size  # log of the product of q
        self._lengths = [0] * batch_size
        self._q: list[Tensor | None] = []
        self.tokens: list[Tensor] = []  # of each depth, [batch] in the target's ids

    def add(self, logits: Tensor) -> bool:
        """Choose a token for each row by logits [batch, draft_vocab_size]; whether any row goes on."""
        if not self._sample.is_greedy:
            return self._add_drawn(logits)
        best = logits.max(-1)
        if self._limit is not None and not self._believe(best.values - logits.logsumexp(-1)):
            return False
        self._count()
        self.tokens.append(self._head.to_target(best.indices))
        return True

    def draft(self, device: torch.device) -> Draft:
        """What has grown; it can be nothing."""
        if not self.tokens:
            return Draft(torch.zeros(len(self._joint), 0, dtype=torch.long, device=device))
        q = [x for x in self._q if x is not None]
        q_all = torch.stack(q, dim=1) if len(q) == len(self.tokens) else None
        lengths = self._lengths if min(self._lengths) < len(self.tokens) else None
        return Draft(torch.stack(self.tokens, dim=1), q=q_all, lengths=lengths)

    def _add_drawn(self, logits: Tensor) -> bool:
        self._count()
        token, q = self._sample(self._head.spread(logits))
        self.tokens.append(token)
        self._q.append(q)
        return self._limit is None or q is None or self._believe(q.gather(1, token[:, None])[:, 0].log())

    def _believe(self, log_q: Tensor) -> bool:
        """Whether any row is still likely with a token of `log_q` [batch] more."""
        assert self._limit is not None
        self._joint = [joint + more for joint, more in zip(self._joint, log_q.tolist(), strict=True)]
        return max(self._joint) >= self._limit

    def _count(self) -> None:
        """One token more for the rows that are likely."""
        limit = float("-inf") if self._limit is None else self._limit
        self._lengths = [n + (joint >= limit) for n, joint in zip(self._lengths, self._joint, strict=True)]


class Frontier(NamedTuple):
    """The nodes of a level that are expanded next."""

    tokens: Tensor  # [batch, top_k] int64, draft ids
    parents: Tensor  # [batch, top_k] int64: index in the frontier before
    ancestors: Tensor  # [batch, top_k, nodes in all frontiers up to this one] bool: itself and those above


class TreeGrowth:
    """Owns the candidates of one tree a row, level by level."""

    def __init__(self, batch_size: int, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._limit = log(plan.min_confidence) if plan.min_confidence > 0 else None
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._num_candidates = 0
        # The root: the one node of the first frontier.
        self._ids = torch.full((batch_size, 1), -1, device=device)
        self._joint = torch.zeros(batch_size, 1, device=device)
        self._ancestors = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)

    @property
    def is_done(self) -> bool:
        """Whether no node of the frontier is worth its children."""
        return self._limit is not None and float(self._joint.max()) < self._limit

    def expand(self, log_q: Tensor) -> Frontier:
        """Take in the log probabilities [batch, nodes of the frontier, draft_vocab_size] below the frontier."""
        top_k = self._plan.top_k
        best = log_q.topk(top_k, dim=-1)
        joint = (self._joint[:, :, None] + best.values).flatten(1)
        tokens = best.indices.flatten(1)
        self._tokens.append(tokens)
        self._scores.append(joint)
        self._parents.append(self._ids.repeat_interleave(top_k, dim=1))
        chosen = joint.topk(top_k, dim=-1)
        parents = chosen.indices // top_k
        self._joint, self._ids = chosen.values, self._num_candidates + chosen.indices
        self._num_candidates += joint.shape[1]
        batch, nodes = parents.shape
        above = self._ancestors.gather(1, parents[:, :, None].expand(-1, -1, self._ancestors.shape[2]))
        own = torch.eye(nodes, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
        self._ancestors = torch.cat([above, own], dim=2)
        return Frontier(tokens.gather(1, chosen.indices), parents, self._ancestors)

    def draft(self, to_target: Callable[[Tensor], Tensor]) -> Draft:
        """The best nodes of all, parents first; those that are not believed in stand last and do not count."""
        scores, tokens = torch.cat(self._scores, dim=1), torch.cat(self._tokens, dim=1)
        parents, num_all = torch.cat(self._parents, dim=1), scores.shape[1]
        # Stable: where a child is as likely as its parent, the parent comes first, and so is kept first.
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : min(self._plan.num_nodes, num_all)]
        doubted, lengths = torch.zeros_like(best), None
        if self._limit is not None:
            doubted = (scores.gather(1, best) < self._limit).long()
            lengths = (best.shape[1] - doubted.sum(1)).tolist()
            best, doubted = best[:, : max(lengths)], doubted[:, : max(lengths)]
        kept = (best + doubted * num_all).sort(dim=1).values % num_all
        numbers = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        places = torch.full_like(parents, -1).scatter(1, kept, numbers)
        above = parents.gather(1, kept)
        above = torch.where(above < 0, above, places.gather(1, above.clamp(min=0)))
        return Draft(to_target(tokens.gather(1, kept)), above, lengths=lengths)
