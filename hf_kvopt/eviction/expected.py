"""ExpectedAttention: keeps the tokens that queries to come are expected to attend to (arXiv:2510.00636).

    queries of the prompt, turned back before their rotation     mean m, covariance C of each head
    rotated to the positions to come, on average                 m' = R m, C' = R C R^T
    expected weight of key k                                     exp(k.m' s + k.C' k s^2 / 2), by its softmax
    score                                                        mean over the heads of a group, times ||v||
    kept in any case                                             the first tokens, and the last ones: the question

Where queries are normal, that is the expectation of exp(q.k s) in closed form. No query needs to be seen for it, so
that a prompt can shrink before its question is known. Where the prompt ends in its question, that must not shrink:
kvpress scores a context alone and appends the question after it, here `window` keeps it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.eviction.policy import PromptStates
from hf_kvopt.eviction.scores import PromptPolicy, check_share


@dataclass(frozen=True)
class ExpectedAttention(PromptPolicy):
    """Keep the tokens of a prompt that queries to come are expected to attend to, its first ones, and its last ones.

    Args:
        keep: share of the prompt's tokens that each KV head keeps, above 0 and at most 1; never less than the window
            and 16 tokens.
        future: positions behind the prompt over which the rotation of queries is averaged.
        sinks: first tokens, which are always kept and whose queries are not counted.
        window: last tokens, which are always kept: the question, where it is part of the prompt.

    Raises:
        ValueError: a share or number that cannot work.
        UnsupportedModel: when a prompt is read by a model without a rotary embedding.

    Source: Expected Attention, arXiv:2510.00636, as in kvpress' ExpectedAttentionPress.

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, cache="int8", policy=ExpectedAttention(keep=0.5))
    """

    keep: float = 0.5
    future: int = 512
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        check_share(self.keep)
        for name, value, least in (("future", self.future, 1), ("sinks", self.sinks, 0), ("window", self.window, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a number of tokens of at least {least}: got {value!r}")

    @property
    def least(self) -> int:
        return self.window + max(self.sinks, super().least)

    def score_states(self, states: PromptStates) -> Tensor:
        num_tokens, dim = states.q.shape[1:]
        positions = torch.arange(num_tokens, device=states.q.device)
        first = min(self.sinks, num_tokens - 1)
        q = states.turn(states.q, positions, True)[:, first:]
        mean = q.mean(dim=1, keepdim=True)  # [num_heads, 1, head_dim]
        covariance = (q - mean).mT @ (q - mean) / num_tokens
        rotation = self._average(states, num_tokens, dim)
        mean, covariance = mean @ rotation, rotation.mT @ covariance @ rotation
        k = states.k[:, first:].float().repeat_interleave(len(states.q) // len(states.k), dim=0)
        logits = (k @ mean.mT)[..., 0] * states.scale + ((k @ covariance) * k).sum(dim=-1) * states.scale**2 / 2
        weights = logits.softmax(dim=-1).unflatten(0, (len(states.k), -1)).mean(dim=1)
        scores = weights * states.v[:, first:].float().norm(dim=-1)
        scores = F.pad(scores, (first, 0), value=torch.inf)
        scores[:, max(0, num_tokens - self.window) :] = torch.inf
        return scores

    def _average(self, states: PromptStates, start: int, dim: int) -> Tensor:
        """Return [head_dim, head_dim]: what turns a row vector, on average, to the positions behind the prompt."""
        places = torch.arange(start, start + self.future, device=states.q.device).repeat_interleave(dim)
        units = torch.eye(dim, device=states.q.device).repeat(self.future, 1)
        return states.turn(units[None], places, False).view(self.future, dim, dim).mean(dim=0)
