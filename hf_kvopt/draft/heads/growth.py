"""EAGLE-2's dynamic tree: the most likely nodes of each depth are expanded, the most likely of all are kept.

The score of a node is the sum of log q along its path, which estimates how likely the target accepts it. Each level
expands its `top_k` best nodes by `top_k` children; at the end the `num_nodes` best of all levels are the draft. A
parent's score is never below its child's, so what is kept is a tree.

Source: EAGLE-2, arXiv:2406.16858, section 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.draft.drafter import Draft


class Frontier(NamedTuple):
    """The nodes of a level that are expanded next."""

    tokens: Tensor  # [batch, top_k] int64, draft ids
    parents: Tensor  # [batch, top_k] int64: index in the frontier before
    ancestors: Tensor  # [batch, top_k, nodes in all frontiers up to this one] bool: itself and those above


class TreeGrowth:
    """Owns the candidates of one draft, level by level."""

    def __init__(self, batch_size: int, top_k: int, device: torch.device) -> None:
        self._top_k = top_k
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._num_candidates = 0
        # The root: the one node of the first frontier.
        self._ids = torch.full((batch_size, 1), -1, device=device)
        self._joint = torch.zeros(batch_size, 1, device=device)
        self._ancestors = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)

    def expand(self, log_q: Tensor) -> Frontier:
        """Take in the log probabilities [batch, nodes of the frontier, draft_vocab_size] below the frontier."""
        best = log_q.topk(self._top_k, dim=-1)
        joint = (self._joint[:, :, None] + best.values).flatten(1)
        tokens = best.indices.flatten(1)
        self._tokens.append(tokens)
        self._scores.append(joint)
        self._parents.append(self._ids.repeat_interleave(self._top_k, dim=1))
        chosen = joint.topk(self._top_k, dim=-1)
        parents = chosen.indices // self._top_k
        self._joint, self._ids = chosen.values, self._num_candidates + chosen.indices
        self._num_candidates += joint.shape[1]
        batch, nodes = parents.shape
        above = self._ancestors.gather(1, parents[:, :, None].expand(-1, -1, self._ancestors.shape[2]))
        own = torch.eye(nodes, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
        self._ancestors = torch.cat([above, own], dim=2)
        return Frontier(tokens.gather(1, chosen.indices), parents, self._ancestors)

    def draft(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """The best nodes of all: draft ids and parents [batch, num_nodes], parents first; see `Draft`."""
        scores, tokens = torch.cat(self._scores, dim=1), torch.cat(self._tokens, dim=1)
        parents = torch.cat(self._parents, dim=1)
        # Stable: where a child is as likely as its parent, the parent comes first, and so is kept first.
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, : min(num_nodes, scores.shape[1])]
        kept = order.sort(dim=1).values
        places = torch.full_like(parents, -1).scatter(
            1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        )
        above = parents.gather(1, kept)
        return tokens.gather(1, kept), torch.where(above < 0, above, places.gather(1, above.clamp(min=0)))


def tree_draft(growth: TreeGrowth, num_nodes: int, d2t: Tensor | None) -> Draft:
    """What has grown, in the target's ids."""
    tokens, parents = growth.draft(num_nodes)
    return Draft(tokens if d2t is None else tokens + d2t[tokens], parents)
