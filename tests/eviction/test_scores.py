"""Prompts that shrink by score: tokens are those of eager attention over what each head chose by its own weights."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config

from hf_kvopt import CACHE_KEYWORD, TOVA, CacheStateError, Knorm, PagedCache, SnapKV, UnsupportedModel, disable, enable
from tests.eviction.scoring import shrunk_tokens
from tests.eviction.test_models import make
from tests.helpers import VOCAB, generate, prompt, tiny_model, unpadded

STEPS = 40


def best(scores, count):
    """Greatest scores of each head; the prompts here repeat no token, so that no two scores are alike."""
    return scores.sort(dim=-1, descending=True).indices[:, :count].sort(dim=-1).values


def distinct(*lengths, seed=0):
    """Rows as `prompt` draws them, each without a token twice: equal tokens have keys of equal length."""
    inputs, generator = prompt(*lengths), torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCAB - 3, generator=generator)[: max(lengths)] + 3 for _ in lengths]
    return {**inputs, "input_ids": torch.stack(rows) * inputs["attention_mask"]}


def count_of(policy, length, least):
    return min(length, max(math.ceil(policy.keep * length), least))


def by_norm(policy):
    return lambda w, k, v: best(-(k * k).sum(-1), count_of(policy, k.shape[1], 16))


def by_last_query(policy):
    def choose(w, k, v):
        scores = w[:, -1].mean(0).clone()
        scores[-1] = 9
        return best(scores[None].expand(len(k), -1), count_of(policy, k.shape[1], 16))

    return choose


def by_window(policy):
    def choose(w, k, v):
        n, window = k.shape[1], min(policy.window, k.shape[1])
        votes = w[:, n - window :, : n - window].mean(1)
        pool = nn.Conv1d(1, 1, policy.kernel, padding=policy.kernel // 2, bias=False)
        pool.weight.data.fill_(1 / policy.kernel)
        smooth = pool(votes[:, None])[:, 0] if n > window else votes
        scores = smooth.view(len(k), len(w) // len(k), n - window).mean(1)
        return best(torch.cat([scores, torch.full((len(k), window), 9.0)], 1), count_of(policy, n, policy.window + 16))

    return choose


CASES = [
    pytest.param(Knorm(0.5), by_norm, id="norm"),
    pytest.param(Knorm(0.31), by_norm, id="norm, a share that fills no block"),
    pytest.param(TOVA(0.4), by_last_query, id="last query"),
    pytest.param(SnapKV(0.25, window=8), by_window, id="last queries"),
    pytest.param(SnapKV(0.5), by_window, id="last 32 queries"),
    pytest.param(SnapKV(0.3, window=5, kernel=1), by_window, id="not smoothed"),
    pytest.param(Knorm(1.0), by_norm, id="all"),
]


@pytest.mark.parametrize(("policy", "reference"), CASES)
@pytest.mark.parametrize("lengths", [(90,), (90, 61, 7), (64, 64)], ids=str)
def test_tokens_are_those_of_eager_attention_over_what_each_head_chose(policy, reference, lengths):
    model, eager, inputs = tiny_model(), tiny_model(attention="eager"), distinct(*lengths)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        own = inputs["input_ids"][row : row + 1, max(lengths) - length :]
        want = shrunk_tokens(eager, own, STEPS, reference(policy))
        assert torch.equal(out[row, max(lengths) - length :], want[0])
    kept = [policy.budget(length) for length in lengths]
    assert cache.stats().evicted == sum(lengths) - sum(kept)
    if policy.keep < 1:
        assert cache.stats().num_tokens == sum(kept) + len(lengths) * (STEPS - 1)
    assert cache.get_seq_length() == max(lengths) + STEPS - 1
    cache.check_integrity()


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3", "int4", "k8v4"])
def test_every_format_shrinks_and_rows_do_not_depend_on_their_batch(kind):
    inputs, model = prompt(90, 61), enable(tiny_model(), cache=kind, policy=SnapKV(0.3, window=8))
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    assert out.get(CACHE_KEYWORD).stats().evicted > 0
    for row, length in enumerate((90, 61)):
        own = unpadded(inputs["input_ids"][row : row + 1, 90 - length :])
        assert torch.equal(
            model.generate(**own, max_new_tokens=STEPS, do_sample=False)[0], out.sequences[row, 90 - length :]
        )
    disable(model)


def test_memory_is_that_of_what_is_kept():
    model = tiny_model()
    whole, part = PagedCache(model.config), PagedCache(model.config, policy=SnapKV(0.25, window=16))
    for cache in (whole, part):
        generate(model, prompt(2000), cache, max_new_tokens=2)
    assert part.stats().used_bytes == pytest.approx(whole.stats().used_bytes / 4, rel=0.05)
    assert part.stats().reserved_bytes < whole.stats().reserved_bytes / 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_of_padded_rows_are_those_of_each_row_alone(options):
    model, policy, inputs = tiny_model(), SnapKV(0.3, window=8), prompt(90, 61)
    cache = PagedCache(model.config, policy=policy)
    torch.manual_seed(2)
    out = generate(model, inputs, cache, max_new_tokens=20, **options)
    cache.check_integrity()
    if "num_beams" in options:
        for row, length in enumerate((90, 61)):
            own = unpadded(inputs["input_ids"][row : row + 1, 90 - length :])
            alone = generate(model, own, PagedCache(model.config, policy=policy), max_new_tokens=20, **options)
            assert torch.equal(alone[0], out[row, 90 - length :])


def test_a_fork_between_prompt_and_first_token_shrinks_by_itself():
    model = tiny_model()
    cache = PagedCache(model.config, policy=SnapKV(0.3, window=8))
    ids = prompt(90, 61)
    with torch.no_grad():
        model(**ids, **{CACHE_KEYWORD: cache})
        twin = copy.deepcopy(cache)
        mask = torch.cat([ids["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        step = {
            "input_ids": torch.tensor([[5], [6]]),
            "attention_mask": mask,
            "position_ids": torch.tensor([[90], [61]]),
        }
        one, other = (model(**step, **{CACHE_KEYWORD: each}).logits for each in (cache, twin))
    assert torch.equal(one, other)
    assert cache.stats().num_tokens == twin.stats().num_tokens < 151
    cache.check_integrity()
    twin.check_integrity()


def test_a_prompt_cannot_be_cut_once_it_was_scored_and_what_follows_can():
    model = tiny_model()
    cache = PagedCache(model.config, policy=SnapKV(0.3, window=8))
    text = generate(model, prompt(90), cache, max_new_tokens=20)
    cache.crop(-19)
    with pytest.raises(CacheStateError, match="by 1 tokens of its prompt"):
        cache.crop(-1)
    again = generate(model, unpadded(text[:, :91]), cache, max_new_tokens=19)
    assert torch.equal(again, text)
    cache.reset()
    assert (cache.stats().used_blocks, cache.stats().evicted) == (0, 0)
    assert torch.equal(generate(model, prompt(90), cache, max_new_tokens=20), text)


def test_a_forward_that_breaks_off_scores_nothing(monkeypatch):
    model = tiny_model()
    cache = PagedCache(model.config, policy=SnapKV(0.3, window=8))
    want = generate(model, prompt(90), PagedCache(model.config, policy=SnapKV(0.3, window=8)))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.model.layers[-1], "forward", _fail)
        with pytest.raises(RuntimeError, match="no power"):
            model(**prompt(90), **{CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match="stopped half way"), torch.no_grad():
        model(input_ids=prompt(5)["input_ids"], **{CACHE_KEYWORD: cache})
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompt(90), cache), want)


def test_models_with_windows_score_their_full_layers():
    model = tiny_model("mixed")
    cache = PagedCache(model.config, policy=SnapKV(0.3, window=8))
    out = generate(model, prompt(90, 61), cache, max_new_tokens=20)
    assert cache.stats().evicted == 90 + 61 - 27 - 24
    for row, length in enumerate((90, 61)):
        own = unpadded(out[row : row + 1, 90 - length : 90])
        alone = generate(model, own, PagedCache(model.config, policy=SnapKV(0.3, window=8)), max_new_tokens=20)
        assert torch.equal(alone[0], out[row, 90 - length :])


def test_latent_attention_is_refused():
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = enable(make(config, "eager"), policy=Knorm(0.5))
    with pytest.raises(UnsupportedModel, match="whose heads share one latent"):
        model.generate(**prompt(40), max_new_tokens=3)


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: Knorm(0), "keep must be a share"),
        (lambda: TOVA(1.5), "keep must be a share"),
        (lambda: SnapKV(True), "keep must be a share"),
        (lambda: SnapKV(0.5, window=0), "window must be a number of tokens"),
        (lambda: SnapKV(0.5, kernel=4), "kernel must be odd"),
    ],
)
def test_numbers_that_cannot_work(make_it, said):
    with pytest.raises(ValueError, match=said):
        make_it()


def _fail(*args, **kwargs):
    raise RuntimeError("no power")
