"""Chunks of a text shrink one by one: tokens of eager attention over what each head keeps, by its own weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_kvopt import (
    ATTENTION_NAME,
    CACHE_KEYWORD,
    CacheStateError,
    Hierarchical,
    PagedCache,
    QuantizedPagedCache,
    SinkRecent,
    UnsupportedModel,
    disable,
    enable,
)
from tests.eviction.scoring import ShrunkLayer
from tests.eviction.test_models import CONFIGS, make
from tests.helpers import generate, prompt, tiny_model

POLICY = Hierarchical(tokens=12, window=8, kernel=3)
CHUNK, STEPS = 40, 24


def plain_tokens(model: PreTrainedModel, chunks: list[Tensor], num_new: int, policy: Hierarchical) -> Tensor:
    """Greedy tokens of an eager model behind `chunks` [1, n], the older ones of which shrink."""
    cache, layers, length = DynamicCache(), [], 0
    settled = newest = 0
    for ids in chunks:
        positions = torch.arange(length, length + ids.shape[1])[None]
        out = model(input_ids=ids, position_ids=positions, output_attentions=True, **{CACHE_KEYWORD: cache})
        length += ids.shape[1]
        held = cache.layers[0].keys.shape[2]
        before = held - ids.shape[1]
        settled, newest, layers = newest, before, []
        kept = min(policy.tokens, newest - settled)
        for layer, weights in zip(cache.layers, out.attentions, strict=True):
            num_heads = layer.keys.shape[1]
            votes = weights[0, :, -policy.window :].mean(1).unflatten(0, (num_heads, -1))
            smooth = F.avg_pool1d(votes, policy.kernel, 1, policy.kernel // 2)
            best = smooth.mean(1)[:, settled:newest].topk(kept).indices.sort().values + settled
            every = torch.arange(held).expand(num_heads, -1)
            index = torch.cat([every[:, :settled], best, every[:, newest:]], 1)[None, :, :, None]
            states = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values))
            layers.append(ShrunkLayer(*states, length))
        newest = settled + kept
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = layers, None
    x, tokens = out.logits[:, -1:].argmax(-1), list(chunks)
    for step in range(num_new):
        tokens.append(x)
        position = torch.tensor([[length + step]])
        x = model(input_ids=x, position_ids=position, **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("lengths", [(150,), (200,), (163,)], ids=str)
@torch.no_grad()
def test_tokens_are_those_of_eager_attention_over_what_is_kept(lengths: tuple[int, ...]) -> None:
    model, inputs = tiny_model(), prompt(*lengths)
    cache = PagedCache(model.config, policy=POLICY)
    out = generate(model, inputs, cache, max_new_tokens=STEPS, prefill_chunk_size=CHUNK)
    want = plain_tokens(tiny_model(attention="eager"), list(inputs["input_ids"].split(CHUNK, 1)), STEPS, POLICY)
    assert torch.equal(out, want)
    num_chunks = -(-lengths[0] // CHUNK)
    assert cache.stats().evicted == (num_chunks - 1) * (CHUNK - 12)
    assert cache.stats().used_blocks == -(-(lengths[0] + STEPS - 1 - cache.stats().evicted) // 16)
    cache.check_integrity()


@torch.no_grad()
def test_a_turn_with_the_answer_before_it_is_a_chunk() -> None:
    model = tiny_model()
    ids = prompt(130)["input_ids"]
    cache = PagedCache(model.config, policy=POLICY)
    model(input_ids=ids[:, :50], **{CACHE_KEYWORD: cache})
    for i in range(50, 60):
        model(input_ids=ids[:, i : i + 1], **{CACHE_KEYWORD: cache})
    assert cache.stats().evicted == 0
    model(input_ids=ids[:, 60:90], **{CACHE_KEYWORD: cache})
    mine = [model(input_ids=ids[:, i : i + 1], **{CACHE_KEYWORD: cache}).logits for i in range(90, 100)]
    assert cache.stats().evicted == 60 - 12
    twin = PagedCache(model.config, policy=POLICY)
    for part in (ids[:, :60], ids[:, 60:90]):
        model(input_ids=part, **{CACHE_KEYWORD: twin})
    theirs = [model(input_ids=ids[:, i : i + 1], **{CACHE_KEYWORD: twin}).logits for i in range(90, 100)]
    assert torch.allclose(torch.cat(mine), torch.cat(theirs), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("format", ["native", "int8"])
def test_padded_rows_forks_and_selections_go_on_as_they_would(format: str) -> None:
    model, inputs = tiny_model(), prompt(120, 75)
    config = model.config

    def fresh() -> PagedCache:
        return QuantizedPagedCache(config, format=format, policy=POLICY) if format != "native" else PagedCache(
            config, policy=POLICY
        )  # fmt: skip

    cache = fresh()
    out = generate(model, inputs, cache, max_new_tokens=STEPS, prefill_chunk_size=CHUNK)
    cache.check_integrity()
    # The short row has 30 tokens of padding in its second chunk: its own chunks are 35 and 40 tokens long.
    own = inputs["input_ids"][1:, 45:]
    alone = fresh()
    logits = [model(input_ids=part, **{CACHE_KEYWORD: alone}).logits for part in (own[:, :35], own[:, 35:])]
    x = logits[-1][:, -1:].argmax(-1)
    tokens = []
    for _ in range(STEPS):
        tokens.append(int(x))
        x = model(input_ids=x, **{CACHE_KEYWORD: alone}).logits[:, -1:].argmax(-1)
    assert out[1, 120:].tolist() == tokens
    fork = copy.deepcopy(cache)
    fork.batch_select_indices(torch.tensor([1, 0]))
    more = inputs["input_ids"][:, :20].clamp(min=3)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, STEPS - 1 + 20, dtype=torch.long)], 1)
    mine = model(input_ids=more, attention_mask=mask, **{CACHE_KEYWORD: cache}).logits
    theirs = model(input_ids=more.flip(0), attention_mask=mask.flip(0), **{CACHE_KEYWORD: fork}).logits
    assert torch.allclose(mine, theirs.flip(0), atol=1e-5)
    for one in (cache, fork):
        one.reset()
        one.check_integrity()


@torch.no_grad()
def test_chunks_that_fit_their_budget_stay_whole() -> None:
    model, ids = tiny_model(), prompt(60)["input_ids"]
    cache, whole = PagedCache(model.config, policy=Hierarchical(tokens=20)), PagedCache(model.config)
    for part in ids.split(15, 1):
        mine = model(input_ids=part, **{CACHE_KEYWORD: cache}).logits
        assert torch.equal(mine, model(input_ids=part, **{CACHE_KEYWORD: whole}).logits)
    assert cache.stats().evicted == 0


class Stops(Hierarchical):
    """Raises once, in the second layer of the second chunk, where the first one has chosen."""

    left = 2

    def score(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        type(self).left -= 1
        if type(self).left == 0:
            raise ValueError("stop")
        return super().score(q, k, v, scale)


@torch.no_grad()
@pytest.mark.parametrize("how", ["refused", "broken off"])
def test_a_chunk_that_is_taken_back_is_read_again_as_if_never(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stops, "left", 2 if how == "refused" else 0)
    model, ids = tiny_model(), prompt(140)["input_ids"]
    caches = [PagedCache(model.config, policy=policy) for policy in (POLICY, Stops(12, 8, 3))]
    logits = []
    for again, cache in enumerate(caches):
        model(input_ids=ids[:, :40], **{CACHE_KEYWORD: cache})
        if again:
            hook = model.model.layers[1].register_forward_hook(_stop) if how == "broken off" else None
            with pytest.raises((RuntimeError, ValueError), match="stop"):
                model(input_ids=ids[:, 40:80], **{CACHE_KEYWORD: cache})
            if hook is not None:
                hook.remove()
                cache.crop(40 - cache.get_seq_length())
            assert cache.get_seq_length() == 40
        for part in (ids[:, 40:80], ids[:, 80:140]):
            out = model(input_ids=part, **{CACHE_KEYWORD: cache}).logits
        logits.append(out)
        model(input_ids=ids[:, :1], **{CACHE_KEYWORD: cache})
        assert cache.stats().evicted == 2 * (40 - 12)
        with pytest.raises(CacheStateError, match="cannot crop row 0"):
            cache.crop(-40)
    assert torch.equal(*logits)


def _stop(*args: object) -> None:
    raise RuntimeError("stop")


@torch.no_grad()
@pytest.mark.parametrize("name", ["windows", "part of a head rotates", "learned positions"])
def test_other_models_take_it(name: str) -> None:
    model = enable(make(CONFIGS[name], ATTENTION_NAME), policy=POLICY)
    out = model.generate(**prompt(100), max_new_tokens=8, do_sample=False, prefill_chunk_size=30)
    assert out.shape[1] == 108
    disable(model)


@torch.no_grad()
def test_what_cannot_work_is_refused() -> None:
    for wrong in ({"tokens": 0}, {"window": 0}, {"kernel": 4}, {"kernel": True}):
        with pytest.raises(ValueError, match="got"):
            Hierarchical(**wrong)
    model = tiny_model()
    with pytest.raises(UnsupportedModel, match="moves tokens of older chunks"):
        model(**prompt(40), **{CACHE_KEYWORD: QuantizedPagedCache(model.config, format="int4", policy=POLICY)})
    assert not SinkRecent().shrinks_chunks
