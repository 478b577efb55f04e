"""Presses of kvpress: an object with their `score`, asked as they are, keeps what they would keep."""

from dataclasses import dataclass

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from hf_kvopt import PagedCache, PressPolicy, disable, enable
from tests.eviction.scoring import shrunk_tokens
from tests.eviction.test_scores import best, distinct
from tests.helpers import generate, prompt, tiny_model, unpadded

STEPS = 30


@dataclass
class LastQueries:
    """A score as kvpress' SnapKVPress has it: queries projected anew from the inputs of the module, and rotated."""

    compression_ratio: float = 0.6
    window: int = 4

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None
        n = keys.shape[2]
        q = module.q_proj(hidden_states[:, -self.window :]).view(1, self.window, -1, module.head_dim).transpose(1, 2)
        cos, sin = (x[:, -self.window :, :].unsqueeze(1) for x in kwargs["position_embeddings"])
        q = q * cos + rotate_half(q) * sin
        k = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
        logits = q @ k.mT * module.head_dim**-0.5
        hidden = torch.ones(self.window, n, dtype=torch.bool).triu(n - self.window + 1)
        votes = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(2)
        return votes.view(1, keys.shape[1], -1, n).mean(2)


def by_weights(press):
    """What the press keeps, from weights of eager attention."""

    def choose(w, k, v):
        votes = w[:, -press.window :].mean(1).view(len(k), -1, k.shape[1]).mean(1)
        return best(votes, int(k.shape[1] * (1 - press.compression_ratio)))

    return choose


@pytest.mark.parametrize("lengths", [(90,), (90, 61)], ids=str)
def test_tokens_are_those_of_eager_attention_over_what_the_press_keeps(lengths):
    model, eager, inputs, press = tiny_model(), tiny_model(attention="eager"), distinct(*lengths), LastQueries()
    policy = PressPolicy(press, model)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        own = inputs["input_ids"][row : row + 1, max(lengths) - length :]
        assert torch.equal(out[row, max(lengths) - length :], shrunk_tokens(eager, own, STEPS, by_weights(press))[0])
    assert cache.stats().evicted == sum(n - int(n * 0.4) for n in lengths)
    assert not policy._inputs  # a step holds nothing
    policy.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_formats_and_windows_take_a_press():
    model = tiny_model("mixed")
    policy = PressPolicy(LastQueries(), model)
    enable(model, cache="int8", policy=policy)
    inputs = prompt(80, 51)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    own = unpadded(inputs["input_ids"][1:, 29:])
    assert torch.equal(model.generate(**own, max_new_tokens=12, do_sample=False)[0], out[1, 29:])
    disable(model)


@pytest.mark.parametrize(
    ("press", "error", "message"),
    [
        (object(), TypeError, r"needs score\(...\) and compression_ratio"),
        (LastQueries(compression_ratio=1), ValueError, "compression_ratio must be a share"),
    ],
    ids=["no press", "nothing kept"],
)
def test_what_is_no_press_is_refused(press, error, message):
    with pytest.raises(error, match=message):
        PressPolicy(press, tiny_model())


def test_a_model_without_attention_a_closed_policy_and_a_wrong_score_are_refused():
    with pytest.raises(ValueError, match="none was found"):
        PressPolicy(LastQueries(), torch.nn.Linear(2, 2))
    model, press = tiny_model(), LastQueries()
    policy = PressPolicy(press, model)
    press.score = lambda *args: torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"a score must be \[1, num_kv_heads, tokens\]"):
        generate(model, prompt(40), PagedCache(model.config, policy=policy), max_new_tokens=2)
    policy.close()
    with pytest.raises(ValueError, match="was closed, or made for another model"):
        generate(model, prompt(40), PagedCache(model.config, policy=policy), max_new_tokens=2)
