"""Expected attention: tokens of eager attention over what each head keeps by the paper's formula, computed densely."""

import math

import pytest
import torch
from torch import Tensor

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, ExpectedAttention, PagedCache, UnsupportedModel, disable, enable
from tests.eviction.scoring import shrunk_tokens
from tests.eviction.test_models import CONFIGS, make
from tests.eviction.test_scores import best, distinct
from tests.helpers import generate, prompt, tiny_model, unpadded

STEPS = 30


class Expected:
    """Choices of `ExpectedAttention`, layer by layer, from queries as a model projects them before their rotation."""

    def __init__(self, model: torch.nn.Module, policy: ExpectedAttention) -> None:
        self.model, self.policy, self.queries = model, policy, []
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: self.queries.append(out[0]))

    def __call__(self, weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_heads, n, (num_kv_heads, _, dim) = len(weights), k.shape[1], k.shape
        q = self.queries.pop(0).view(n, num_heads, dim).transpose(0, 1)[:, self.policy.sinks :]
        cos, sin = self.model.model.rotary_emb(q, torch.arange(n, n + self.policy.future)[None])
        half = dim // 2
        turn = torch.zeros(dim, dim)
        turn[half:, :half], turn[:half, half:] = torch.eye(half), -torch.eye(half)
        rotation = (cos[0, :, None] * torch.eye(dim) + sin[0, :, None] * turn).mean(dim=0)
        scores = torch.full((num_kv_heads, n), 1e9)
        for head in range(num_kv_heads):
            keys, own = k[head, self.policy.sinks :], []
            for one in range(head * num_heads // num_kv_heads, (head + 1) * num_heads // num_kv_heads):
                mean, spread = q[one].mean(0), q[one] - q[one].mean(0)
                mean, covariance = rotation @ mean, rotation @ (spread.T @ spread / n) @ rotation.T
                logits = [(key @ mean) / math.sqrt(dim) + key @ covariance @ key / dim / 2 for key in keys]
                own.append(torch.stack(logits).softmax(0))
            scores[head, self.policy.sinks :] = torch.stack(own).mean(0) * v[head, self.policy.sinks :].norm(dim=-1)
        scores[:, n - self.policy.window :] = 1e9
        return best(scores, self.policy.budget(n))


@pytest.mark.parametrize("lengths", [(90,), (90, 61)], ids=str)
@pytest.mark.parametrize(
    "policy", [ExpectedAttention(0.4, window=8), ExpectedAttention(0.3, future=16, sinks=0, window=1)], ids=str
)
@torch.no_grad()
def test_tokens_are_those_of_the_formula(policy: ExpectedAttention, lengths: tuple[int, ...]) -> None:
    model, inputs = tiny_model(), distinct(*lengths)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        eager = tiny_model(attention="eager")
        own = inputs["input_ids"][row : row + 1, max(lengths) - length :]
        want = shrunk_tokens(eager, own, STEPS, Expected(eager, policy))
        assert torch.equal(out[row, max(lengths) - length :], want[0])
    assert cache.stats().evicted == sum(lengths) - sum(policy.budget(length) for length in lengths)


@pytest.mark.parametrize("name", ["normed heads", "windows", "caps on scores", "part of a head rotates"])
def test_other_models_shrink_rows_as_alone(name: str) -> None:
    model = enable(make(CONFIGS[name], ATTENTION_NAME), cache="int8", policy=ExpectedAttention(0.4, window=8))
    inputs = prompt(80, 51)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    own = unpadded(inputs["input_ids"][1:, 29:])
    assert torch.equal(model.generate(**own, max_new_tokens=12, do_sample=False)[0], out[1, 29:])
    disable(model)


@torch.no_grad()
def test_a_model_without_rotation_is_refused_and_its_cache_goes_on() -> None:
    model = make(CONFIGS["learned positions"], ATTENTION_NAME)
    cache = PagedCache(model.config, policy=ExpectedAttention(0.5, window=2))
    with pytest.raises(UnsupportedModel, match=r"no rotary embedding was found; use SnapKV"):
        model(**prompt(40), **{CACHE_KEYWORD: cache})
    assert cache.stats().num_tokens == 0
    cache.check_integrity()


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": 2}, {"future": 0}, {"future": 1.5}, {"sinks": -1}, {"sinks": True}, {"window": -1}],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ExpectedAttention(**options)
