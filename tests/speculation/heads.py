"""Tiny heads for the tiny targets of tests/helpers.py, and features of a text."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Read
from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead
from hf_kvopt.speculation.heads.medusa import MedusaHead
from tests.helpers import VOCAB

HIDDEN, DRAFT_VOCAB = 32, 41
_EAGLE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
}
# Sizes that the compiled CPU kernel supports.
_EVEN = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
EAGLES = (
    "eagle3",
    "eagle3 compiled",
    "eagle3 with the target's lm head",
    "eagle3 of two layers",
    "eagle3 with norms",
    "eagle1",
)
KINDS = (*EAGLES, "medusa", "medusa with the target's lm head")


def tiny_head(kind: str = "eagle3", seed: int = 1) -> HeadBase:
    """Build the head of a kind for the tiny Llama: a kind and a seed always give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = _make(kind)
        if isinstance(head, MedusaHead):
            torch.nn.init.normal_(head.block_weight, std=0.2)
    if head.d2t is not None:
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
        head.set_draft_vocab(order[: head.config.draft_vocab_size].sort()[0])
    return head.eval()


def _make(kind: str) -> HeadBase:
    reduced = {**_EAGLE, "draft_vocab_size": DRAFT_VOCAB, "target_layer_ids": (0, 1, -1)}
    if kind == "eagle3":
        return EagleHead(EagleConfig(**reduced))
    if kind == "eagle3 compiled":
        return EagleHead(EagleConfig(**{**reduced, **_EVEN, "draft_vocab_size": 64}))
    if kind == "eagle3 with the target's lm head":
        return EagleHead(EagleConfig(**{**reduced, **_EVEN, "draft_vocab_size": 64}, own_lm_head=False))
    if kind == "eagle3 of two layers":
        return EagleHead(EagleConfig(**reduced, num_hidden_layers=2, attention_bias=True, own_embeddings=True))
    if kind == "eagle3 with norms":
        norms = {"norm_before_residual": True, "fc_norm": True, "norm_output": True, "qk_norm": True}
        return EagleHead(EagleConfig(**reduced, **norms))
    if kind == "eagle1":
        return EagleHead(EagleConfig(**_EAGLE, eagle_version=1, fc_bias=True))
    if kind == "medusa":
        medusa = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "initializer_range": 0.25}
        return MedusaHead(MedusaConfig(**medusa, draft_vocab_size=DRAFT_VOCAB, medusa_num_layers=2))
    return MedusaHead(MedusaConfig(hidden_size=HIDDEN, vocab_size=VOCAB, shared_lm_head=True))


@torch.no_grad()
def features_of(head: HeadBase, target: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the target's features of `input_ids`: [batch, length, width]."""
    out = target(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    return torch.cat([out.hidden_states[layer] for layer in head.feature_layers], dim=-1)


def read_of(head: HeadBase, target: PreTrainedModel, rows: list[Tensor], starts: list[int] | None = None) -> Read:
    """Return a `Read` of each row except its last token, from position `starts[i]` on, padded on the right."""
    starts = starts or [0] * len(rows)
    counts = [len(row) - 1 - start for row, start in zip(rows, starts, strict=True)]
    shape = len(rows), max(counts)
    tokens, following, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    features = None
    for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        tokens[i, :count], following[i, :count] = row[start:-1], row[start + 1 :]
        positions[i, :count] = torch.arange(start, start + count)
        own = features_of(head, target, row[None, :-1])[0, start:]
        if features is None:
            # Not zeros: padding must not matter.
            features = torch.full((*shape, own.shape[-1]), 7.0)
        features[i, :count] = own
    return Read(tokens, following, positions, features, counts)


class Greedy:
    """Arg max sampler, as used by the loop."""

    is_greedy = True

    def __call__(self, logits: Tensor) -> tuple[Tensor, None]:
        return logits.argmax(-1), None


class Stochastic:
    """Sampler that draws from the softmax and returns it."""

    is_greedy = False

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.softmax(logits, dim=-1)
        return torch.multinomial(q, 1, generator=self._generator)[:, 0], q
