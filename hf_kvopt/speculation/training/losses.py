"""Training loss of a draft head: cross-entropy with the target's own distribution at every step of a draft.

    L = sum_i 0.8^i mean_t CE(p(. | x_<=t+1+i), q_i(. | t))        q_i: the head's i-th guess from position t

p is the target's distribution over those of its most likely tokens that the head can propose; positions whose
most likely token the head cannot propose are left out. For EAGLE-3 q_i is rolled out over the head's own features
(training-time test), for Medusa it is head i + 1.

Source: EAGLE-3, arXiv:2503.01840 (0.8^i as in its authors' code); Medusa-1, arXiv:2401.10774, section 2.2.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.training.features import Seen


class Outcome(NamedTuple):
    """Loss and hits of the head on a batch of rows."""

    loss: Tensor  # scalar
    hits: Tensor  # [num_steps, batch, positions] bool: the guess is the target's arg max


class RolledOutLoss(nn.Module):
    """The loss as a module, so that it can be compiled and wrapped for several processes."""

    def __init__(self, head: HeadBase, num_steps: int, decay: float = 0.8) -> None:
        super().__init__()
        self.head, self.num_steps, self.decay = head, num_steps, decay

    def forward(self, input_ids: Tensor, seen: Seen) -> Outcome:
        """Return loss and hits on rows [batch, row_len]; all positions but the last `num_steps` count."""
        head, length = self.head, input_ids.shape[1] - self.num_steps
        places, p = self._aims(seen)
        reachable = (p[..., 0] > 0).float()
        loss, hits = p.new_zeros(()), []
        for step, logits in enumerate(head.rollout(seen.features, input_ids, self.num_steps)):
            here = slice(1 + step, 1 + step + length)
            logits = logits.float()
            aimed = (p[:, here] * logits.gather(-1, places[:, here])).sum(-1)
            loss = loss + self.decay**step * (reachable[:, here] * (logits.logsumexp(dim=-1) - aimed)).mean()
            hits.append(head.to_target(logits.argmax(-1)) == seen.best[:, here])
        return Outcome(loss, torch.stack(hits))

    def _aims(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return draft ids and probabilities [batch, row_len, num_top]; tokens that cannot be proposed get 0."""
        if self.head.t2d is None:
            return seen.top_ids, seen.top_p / seen.top_p.sum(-1, keepdim=True)
        places = self.head.t2d.cumsum(0).sub(1).clamp(min=0)[seen.top_ids]
        p = seen.top_p * self.head.t2d[seen.top_ids]
        return places, p / p.sum(-1, keepdim=True).clamp(min=1e-9)


def accepted_lengths(outcome: Outcome, input_ids: Tensor, best: Tensor) -> Tensor:
    """Return [batch, positions]: tokens of a greedy chain from each position that the target would accept.

    A chain is followed while the text itself continues with the target's arg max. The result is exact on the target's
    own greedy continuations, and a lower bound on any other text.
    """
    num_steps, _, length = outcome.hits.shape
    alive = torch.ones_like(outcome.hits[0])
    accepted = torch.zeros_like(outcome.hits[0], dtype=torch.long)
    for step in range(num_steps):
        if step:
            # This step was fed the text's token in place of the one guessed before.
            alive = alive & (input_ids[:, 1 + step : 1 + step + length] == best[:, step : step + length])
        alive = alive & outcome.hits[step]
        accepted += alive
    return accepted


def walk(accepted: Sequence[Sequence[int]], start: int) -> list[int]:
    """Return the tokens of each step of decoding the rows of `accepted_lengths` from `start`."""
    gains = []
    for row in accepted:
        position = start
        while position < len(row):
            gains.append(row[position] + 1)
            position += gains[-1]
    return gains
