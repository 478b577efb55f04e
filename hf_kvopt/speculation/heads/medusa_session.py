"""Session of Medusa heads: it keeps only the target's last hidden state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_kvopt.speculation.drafters.base import Draft, DraftSession, Plan, Read, Sampler
from hf_kvopt.speculation.heads.growth import ChainGrowth, TreeGrowth

if TYPE_CHECKING:
    from hf_kvopt.speculation.heads.medusa import MedusaHead


class MedusaSession(DraftSession):
    """Drafts one token for each head; a tree spans the product of their guesses."""

    def __init__(self, head: "MedusaHead") -> None:
        self._head = head
        self._feature: Tensor | None = None  # [batch, hidden_size]

    def extend(self, read: Read) -> None:
        assert read.features is not None  # the loop brings what `feature_layers` asks for
        last = torch.tensor(read.counts, device=read.features.device) - 1
        self._feature = read.features[torch.arange(len(last), device=last.device), last]

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        assert self._feature is not None  # extend comes first
        head, feature = self._head, self._feature
        logits = head(feature)[: plan.gamma]
        if plan.is_chain:
            chain = ChainGrowth(head, len(feature), plan.min_confidence, sample)
            for guess in logits[: plan.num_nodes]:
                if not chain.add(guess):
                    break
            return chain.draft(feature.device)
        growth = TreeGrowth(len(feature), plan, feature.device)
        nodes = 1
        for log_q in torch.log_softmax(logits, dim=-1):
            nodes = growth.expand(log_q[:, None].expand(-1, nodes, -1)).tokens.shape[1]
        return growth.draft(head.to_target)

    def select(self, rows: Sequence[int]) -> None:
        if self._feature is not None:
            self._feature = self._feature[torch.tensor(rows, dtype=torch.long, device=self._feature.device)]
