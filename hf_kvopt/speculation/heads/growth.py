"""Growth of drafts: chains token by token, trees level by level, while the head is confident enough.

The joint probability of a node, the product of q along its path, estimates how likely the target accepts it. A chain
ends where its mean over the rows falls below `Plan.min_confidence`. A tree is EAGLE-2's: each level expands its
`top_k` best nodes by `top_k` children, and the `num_nodes` best of all levels are the draft, except those below the
limit. A parent is never less likely than its child, so the nodes that remain form a tree.

Source: EAGLE-2, arXiv:2406.16858, section 4.
"""

from collections.abc import Callable
from math import exp, log
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.speculation.drafters.base import Draft, Plan, Sampler
from hf_kvopt.speculation.heads.base import HeadBase


class ChainGrowth:
    """Grows one chain for each row, all of one length: a column costs the same for one row as for all.

    The chain ends where the mean over the rows of the joint probability falls below the limit. Arg max tokens of that
    column are dropped. Drawn ones stay, and the chain ends after them: dropping tokens by their value would change the
    distribution that the others are drawn from.
    """

    def __init__(self, head: HeadBase, batch_size: int, min_confidence: float, sample: Sampler) -> None:
        self._head, self._sample, self._limit = head, sample, min_confidence
        self._joint = [0.0] * batch_size  # log of the product of q, for each row
        self._q: list[Tensor | None] = []
        self.tokens: list[Tensor] = []  # for each depth [batch], target ids

    def add(self, logits: Tensor) -> bool:
        """Choose a token for each row from logits [batch, draft_vocab_size]; return whether the chain continues."""
        if not self._sample.is_greedy:
            token, q = self._sample(self._head.spread(logits))
            self.tokens.append(token)
            self._q.append(q)
            return self._limit <= 0 or q is None or self._believe(q.gather(1, token[:, None])[:, 0].log())
        best = logits.max(-1)
        if self._limit > 0 and not self._believe(best.values - logits.logsumexp(-1)):
            return False
        self.tokens.append(self._head.to_target(best.indices))
        return True

    def draft(self, device: torch.device) -> Draft:
        """Return the chain as grown so far, possibly empty."""
        if not self.tokens:
            return Draft(torch.zeros(len(self._joint), 0, dtype=torch.long, device=device))
        q = [x for x in self._q if x is not None]
        q_all = torch.stack(q, dim=1) if len(q) == len(self.tokens) else None
        return Draft(torch.stack(self.tokens, dim=1), q=q_all)

    def _believe(self, log_q: Tensor) -> bool:
        """Add `log_q` [batch] to the joint log probabilities; return whether the chain is still above the limit."""
        self._joint = [joint + more for joint, more in zip(self._joint, log_q.tolist(), strict=True)]
        return sum(map(exp, self._joint)) >= self._limit * len(self._joint)


class Frontier(NamedTuple):
    """Nodes of a level that are expanded next."""

    tokens: Tensor  # [batch, top_k] int64, draft ids
    parents: Tensor  # [batch, top_k] int64: index in the previous frontier
    ancestors: Tensor  # [batch, top_k, nodes in all frontiers up to this one] bool: the node and its ancestors


class TreeGrowth:
    """Grows one tree for each row, level by level, and owns its candidates."""

    def __init__(self, batch_size: int, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._limit = log(plan.min_confidence) if plan.min_confidence > 0 else None
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._num_candidates = 0
        # The first frontier is the root.
        self._ids = torch.full((batch_size, 1), -1, device=device)
        self._joint = torch.zeros(batch_size, 1, device=device)
        self._ancestors = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)

    @property
    def is_done(self) -> bool:
        """Return whether no node of the frontier is above the limit."""
        return self._limit is not None and float(self._joint.max()) < self._limit

    def expand(self, log_q: Tensor) -> Frontier:
        """Take log probabilities [batch, nodes, draft_vocab_size] below the frontier; return the next frontier."""
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
        """Return the best nodes of all levels, parents first; nodes below the limit come last and are not counted."""
        scores, tokens = torch.cat(self._scores, dim=1), torch.cat(self._tokens, dim=1)
        parents, num_all = torch.cat(self._parents, dim=1), scores.shape[1]
        # Stable sort: a parent stays before a child of equal probability, and so is kept first.
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
