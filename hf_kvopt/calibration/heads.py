"""Retrieval heads: which KV heads of a model look far back, by what each would lose if it did not (arXiv:2410.10819).

    text             [ passage ][ the same passage again ]
    second passage   out      attention of each head over all tokens
                     out'     over its first and newest tokens alone
    loss of a head   |out - out'|^2 / |out|^2

Heads that find what was said before go to the first passage for what comes next (induction heads); for the others the
neighbourhood is enough. DuoAttention trains a gate for each head, and this measures in one forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.eviction.policy import PromptStates
from hf_kvopt.eviction.scores import PromptPolicy
from hf_kvopt.overrides.attention import our_attention

_PASSAGE = 512  # tokens
_SINKS, _RECENT = 16, 64  # that a head sees without looking far back; less than a passage


class _Probe(PromptPolicy):
    """Measures the heads of each layer that reads a prompt, and keeps all of it but a token."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # [num_kv_heads] a layer

    def budget(self, length: int) -> int:
        return length - 1

    def score_states(self, states: PromptStates) -> Tensor:
        self.losses.append(_losses(states))
        return states.k[..., 0].float()  # any: the cache is dropped behind this prompt


def retrieval_heads(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[int] | None = None,
    *,
    share: float = 0.5,
) -> list[list[int]]:
    """Measure which KV heads of a model must keep the whole text, for `DuoAttention(heads=...)`.

    Args:
        model: a decoder in evaluation mode with layers of full attention.
        input_ids: tokens of a passage, [n] or [1, n] with n of at least 128, such as the model is used on; it is read
            twice in a row. None draws 512 tokens from the vocabulary.
        share: of all KV heads that are to keep all, from 0 to 1; which of them in each layer follows from the losses.

    Returns:
        For each layer without a window the numbers of its whole heads, ascending.

    Raises:
        ValueError: a share or passage that cannot work.
        UnsupportedModel: a model that a policy cannot act on; see docs/guides/bounded-memory.md.

    Source: DuoAttention, arXiv:2410.10819; induction heads, arXiv:2209.11895.

    Examples:
        >>> heads = retrieval_heads(model, share=0.5)
    """
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"share must be a share of the KV heads, from 0 to 1: got {share!r}; 0.5 is usual")
    passage = _passage(model, input_ids)
    probe = _Probe()
    cache = PagedCache(model.config.get_text_config(decoder=True), policy=probe)
    given: dict[str, Any] = {compat.CACHE_KEYWORD: cache}
    with our_attention(model), torch.no_grad():
        model(input_ids=torch.cat([passage, passage], dim=1), **given)
    if not probe.losses:
        raise UnsupportedModel(f"heads are measured in layers of full attention: got a {type(model).__name__} of none")
    losses = torch.cat(probe.losses)
    kept = set(losses.argsort(descending=True)[: round(share * len(losses))].tolist())
    first, heads = 0, []
    for own in probe.losses:
        heads.append([head for head in range(len(own)) if first + head in kept])
        first += len(own)
    return heads


def _passage(model: PreTrainedModel, input_ids: Tensor | Sequence[int] | None) -> Tensor:
    """Return the tokens to read twice, [1, n] on the device of the model."""
    if input_ids is None:
        size = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(size, (1, _PASSAGE), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.as_tensor(input_ids).reshape(1, -1)
    if ids.shape[1] < 2 * _RECENT:
        raise ValueError(f"a passage must have {2 * _RECENT} tokens or more: got {ids.shape[1]}; pass a longer one")
    return ids.to(model.device)


def _losses(states: PromptStates) -> Tensor:
    """Return [num_kv_heads]: what each KV head's queries in the second half lose without the tokens far back."""
    num_tokens = states.k.shape[1]
    half = num_tokens // 2
    queries, keys = torch.arange(half, num_tokens)[:, None], torch.arange(num_tokens)
    hidden = (keys > queries).to(states.k.device)
    far = ((keys >= _SINKS) & (keys <= queries - _RECENT)).to(states.k.device)
    losses = []
    for q, k, v in zip(states.q.unflatten(0, (len(states.k), -1)), states.k, states.v, strict=True):
        scores = (q[:, half:].float() @ k.float().T * states.scale).masked_fill(hidden, -torch.inf)
        whole = scores.softmax(dim=-1) @ v.float()
        near = scores.masked_fill(far, -torch.inf).softmax(dim=-1) @ v.float()
        losses.append((whole - near).square().sum() / whole.square().sum().clamp(min=1e-12))
    return torch.stack(losses).cpu()
