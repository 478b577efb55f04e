"""One generate() call of Medusa heads: nothing is kept but the target's last hidden state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_kvopt.draft.drafter import Draft, DraftSession, Plan, Read, Sampler
from hf_kvopt.draft.heads.growth import TreeGrowth, tree_draft

if TYPE_CHECKING:
    from hf_kvopt.draft.heads.medusa import MedusaHead


class MedusaSession(DraftSession):
    """Drafts as deep as there are heads; a tree is grown over the product of their guesses."""

    def __init__(self, head: "MedusaHead") -> None:
        self._head = head
        self._feature: Tensor | None = None  # [batch, hidden_size]

    def extend(self, read: Read) -> None:
        assert read.features is not None  # the loop brings what `feature_layers` asks for
        last = torch.tensor(read.counts, device=read.features.device) - 1
        self._feature = read.features[torch.arange(len(last), device=last.device), last]

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        assert self._feature is not None  # extend comes first
        head = self._head
        logits = head(self._feature)[: plan.gamma]
        if not plan.is_chain:
            growth = TreeGrowth(logits.shape[1], plan.top_k, logits.device)
            nodes = 1
            for log_q in torch.log_softmax(logits, dim=-1):
                nodes = growth.expand(log_q[:, None].expand(-1, nodes, -1)).tokens.shape[1]
            return tree_draft(growth, plan.num_nodes, head.d2t)
        logits = logits[: plan.num_nodes]
        if sample.is_greedy:
            return Draft(head.to_target(logits.argmax(-1)).T)
        tokens, q = zip(*(sample(head.spread(x)) for x in logits), strict=True)
        is_drawn = all(x is not None for x in q)
        return Draft(torch.stack(tokens, dim=1), q=torch.stack(q, dim=1) if is_drawn else None)

    def select(self, rows: Sequence[int]) -> None:
        if self._feature is not None:
            self._feature = self._feature[torch.tensor(rows, dtype=torch.long, device=self._feature.device)]
