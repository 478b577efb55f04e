"""Policies that shrink a prompt once, behind its forward: each KV head of each layer keeps its best tokens by score.

    prompt of n tokens ─► forward ─► scores [num_kv_heads, n] in each layer ─► the best `keep * n` of each head
                                                                                decoding goes on behind these

    Knorm     -||k||                                            arXiv:2406.11430
    TOVA      weight that the last query gives, over all heads  arXiv:2401.06104
    SnapKV    weight that the last 32 queries give, smoothed    arXiv:2404.14469

`ExpectedAttention` and `PyramidKV` are in files of their own.

Heads keep unlike tokens, and equally many, so that one block table serves all of them. Tokens that are generated, and
later turns, are all kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.eviction.policy import EvictionPolicy

_LEAST = 16  # tokens that are kept of any prompt, however small the share


class PromptPolicy(EvictionPolicy):
    """Base of policies that score the tokens of a prompt; one of your own has a `keep` and overrides `score`.

    A prompt is the first forward of a cache: a prompt that is read in chunks is scored in its first chunk alone.
    """

    scores_prompts = True
    keep: float

    def after_step(self, length: int) -> Sequence[range]:
        return []

    def budget(self, length: int) -> int:
        return min(length, max(math.ceil(self.keep * length), self.least))

    @property
    def least(self) -> int:
        """Tokens that are kept of any prompt."""
        return _LEAST


@dataclass(frozen=True)
class Knorm(PromptPolicy):
    """Keep the tokens of a prompt whose keys are shortest: they tend to be attended to most.

    Args:
        keep: share of the prompt's tokens that each KV head keeps, above 0 and at most 1.

    Raises:
        ValueError: a share that cannot be kept.

    Source: L2 norms of keys, arXiv:2406.11430.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share(self.keep)

    def score(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return -k.float().norm(dim=-1)


@dataclass(frozen=True)
class TOVA(PromptPolicy):
    """Keep the tokens of a prompt that its last query attends to most; the same in all heads of a layer.

    Args:
        keep: share of the prompt's tokens that each KV head keeps, above 0 and at most 1.

    Raises:
        ValueError: a share that cannot be kept.

    Source: Token Omission Via Attention, arXiv:2401.06104, applied to the prompt alone.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share(self.keep)

    def score(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        weights = _weights(q[:, -1:], k, scale).mean(dim=(0, 1, 2))
        weights[-1] = torch.inf  # the last token is always kept
        return weights.expand(len(k), -1)


@dataclass(frozen=True)
class SnapKV(PromptPolicy):
    """Keep the tokens of a prompt that its last queries attend to most, and those last tokens.

    Args:
        keep: share of the prompt's tokens that each KV head keeps, above 0 and at most 1; never less than the window
            and 16 tokens.
        window: queries at the end of the prompt that vote, and tokens that are always kept.
        kernel: odd number of neighbouring tokens over which votes are averaged.

    Raises:
        ValueError: a share, window or kernel that cannot work.

    Source: SnapKV, arXiv:2404.14469.

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, cache="int8", policy=SnapKV(keep=0.25))
    """

    keep: float = 0.25
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_share(self.keep)
        check_votes(self.window, self.kernel)

    @property
    def least(self) -> int:
        return self.window + _LEAST

    def score(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        window = min(self.window, k.shape[1])
        scores = attended(q[:, -window:], k, scale, self.kernel, k.shape[1] - window)
        return F.pad(scores, (0, window), value=torch.inf)


def check_votes(window: int, kernel: int) -> None:
    """Raise ValueError unless the last `window` queries can vote, and votes be averaged over `kernel` neighbours."""
    for name, value in (("window", window), ("kernel", kernel)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a number of tokens of at least 1: got {value!r}")
    if not kernel % 2:
        raise ValueError(f"kernel must be odd, so that votes stay where they are: got {kernel}")


def attended(
    q: Tensor,  # [num_heads, queries, head_dim], the last ones
    k: Tensor,  # [num_kv_heads, tokens, head_dim]
    scale: float,
    kernel: int,  # odd
    num_tokens: int | None = None,
) -> Tensor:  # [num_kv_heads, num_tokens]
    """Return the mean weight that queries give to the first `num_tokens` tokens, averaged over neighbours."""
    votes = _weights(q, k, scale)[..., :num_tokens].mean(dim=2)
    smooth = F.avg_pool1d(votes, kernel, stride=1, padding=kernel // 2) if votes.shape[-1] else votes
    return smooth.mean(dim=1)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return causal weights of the last queries on all keys, [num_kv_heads, heads of a group, queries, tokens]."""
    num_queries, num_tokens = q.shape[1], k.shape[1]
    grouped = q.float().unflatten(0, (len(k), -1))
    scores = grouped @ k.float()[:, None].mT * scale
    hidden = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=q.device).triu(num_tokens - num_queries + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def check_share(keep: object) -> None:
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(
            f"keep must be a share of the prompt above 0 and at most 1: got {keep!r}; 0.25 keeps a quarter"
        )
