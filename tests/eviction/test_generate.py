"""generate() over a bounded cache gives the tokens of plain transformers with the same tokens masked out."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_kvopt import CACHE_KEYWORD, PagedCache, SinkRecent, SinkRecentPeriodic, disable, enable
from tests.eviction.dropping import dropping_cache
from tests.eviction.reference import assert_same_tokens, dense_logits
from tests.helpers import eager_continuation, generate, prompt, tiny_model, unpadded

POLICIES = [
    pytest.param(SinkRecent(16, 32), id="whole blocks"),
    pytest.param(SinkRecent(4, 37), id="numbers that fill no block"),
    pytest.param(SinkRecent(0, 16), id="no sinks, one block"),
    pytest.param(SinkRecentPeriodic(4, 32, 64), id="periodic"),
    pytest.param(SinkRecentPeriodic(20, 35, 50), id="periodic, numbers that fill no block"),
]
STEPS = 90


def full(text):
    return eager_continuation("full", text, max_new_tokens=STEPS)


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_dense_attention_over_what_is_kept(policy):
    model, inputs = tiny_model(), prompt(70)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    assert_same_tokens(tiny_model(attention="eager"), out[0], 70, policy)
    assert not torch.equal(out, full(inputs["input_ids"]))
    assert cache.stats().evicted > 0
    assert cache.stats().num_tokens + cache.stats().evicted == cache.get_seq_length() == 70 + STEPS - 1
    cache.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", [(70, 41), (49, 70, 5), (64, 48), (70, 1)], ids=str)
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(policy, lengths):
    model, inputs = tiny_model(), prompt(*lengths)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        assert_same_tokens(tiny_model(attention="eager"), out[row, max(lengths) - length :], length, policy)
    assert cache.get_seq_length() == max(lengths) + STEPS - 1
    cache.check_integrity()


@pytest.mark.parametrize("chunk", [16, 24, 7])
def test_padding_longer_than_a_chunk_of_the_prompt(chunk):
    policy, model, inputs = SinkRecent(4, 16), tiny_model(), prompt(100, 20)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=40, prefill_chunk_size=chunk)
    alone = PagedCache(model.config, policy=policy)
    first = generate(model, prompt(100), alone, max_new_tokens=40, prefill_chunk_size=chunk)
    assert torch.equal(out[0], first[0])
    # The short row is read whole by the last chunks, and drops nothing before it has read its prompt.
    held = cache.stats()
    assert held.num_tokens < 2 * (4 + 16 + 3 * 16)
    cache.check_integrity()


def test_a_model_with_windows_keeps_them_and_drops_in_its_full_layers():
    policy, model, inputs = SinkRecent(4, 32), tiny_model("mixed"), prompt(70, 41)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    # Each row alone, and the padded batch, agree; sliding layers hold their window.
    for row, length in enumerate((70, 41)):
        own = out[row : row + 1, 70 - length : 70]
        alone = generate(model, unpadded(own), PagedCache(model.config, policy=policy), max_new_tokens=STEPS)
        assert torch.equal(alone[0], out[row, 70 - length :])
    assert cache.stats().evicted > 0


@pytest.mark.parametrize("size", [16, 32, 64])
def test_blocks_of_any_size(size):
    policy, model, inputs = SinkRecent(4, 64), tiny_model(), prompt(140, 77)
    cache = PagedCache(model.config, policy=policy, block_size=size)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate((140, 77)):
        assert_same_tokens(tiny_model(attention="eager"), out[row, 140 - length :], length, policy, size)


@pytest.mark.parametrize("kind", ["paged", "int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4"])
def test_every_format_takes_a_policy(kind):
    policy, inputs = SinkRecent(4, 32), prompt(70, 41)
    model = enable(tiny_model(), cache=kind, policy=policy, block_size=16)
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    cache = out.get(CACHE_KEYWORD)
    assert cache.stats().evicted > 0
    for row, length in enumerate((70, 41)):  # a row never depends on its neighbours, padding or place
        own = inputs["input_ids"][row : row + 1, 70 - length :]
        alone = model.generate(**unpadded(own), max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(alone[0], out.sequences[row, 70 - length :])
    disable(model)


def test_a_cache_that_nothing_is_dropped_from_gives_all_of_the_text():
    model, inputs = tiny_model(), prompt(70, 41)
    cache = PagedCache(model.config, policy=SinkRecent(4, 4096))
    eager = tiny_model(attention="eager")
    want = generate(eager, inputs, DynamicCache(config=eager.config), max_new_tokens=STEPS)
    assert torch.equal(generate(model, inputs, cache, max_new_tokens=STEPS), want)
    assert cache.stats().evicted == 0


def test_further_turns_go_on_behind_a_hole():
    policy, model = SinkRecent(4, 32), tiny_model()
    eager, cache = tiny_model(attention="eager"), PagedCache(model.config, policy=policy)
    first = generate(model, prompt(60), cache, max_new_tokens=50)
    text = torch.cat([first, prompt(13, seed=5)["input_ids"]], dim=1)
    held = cache.get_seq_length()
    assert held == 109
    out = generate(model, unpadded(text), cache, max_new_tokens=30)
    forwards = [0, *range(60, 110), text.shape[1], *range(text.shape[1] + 1, out.shape[1] + 1)]
    logits = dense_logits(eager, out[0], policy, forwards)
    assert torch.equal(logits[text.shape[1] - 1 : -1].argmax(-1), out[0, text.shape[1] :])


GENERATE = [
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}, id="returned beams"),
    pytest.param({"do_sample": True, "num_return_sequences": 3}, id="samples"),
    pytest.param({"num_beams": 2, "do_sample": True}, id="sampled beams"),
    pytest.param({"repetition_penalty": 1.5}, id="penalty"),
    pytest.param({"prefill_chunk_size": 16}, id="chunks of a block"),
    pytest.param({"prefill_chunk_size": 25}, id="chunks"),
]


@pytest.mark.parametrize("options", GENERATE)
@pytest.mark.parametrize("policy", [SinkRecent(4, 20), SinkRecentPeriodic(4, 16, 40)], ids=str)
def test_whatever_generate_does_is_what_it_does_with_plain_tensors(policy, options):
    model, inputs = tiny_model(), unpadded(prompt(60, 60)["input_ids"])
    cache = PagedCache(model.config, policy=policy)
    torch.manual_seed(3)
    out = generate(model, inputs, cache, max_new_tokens=50, **options)
    torch.manual_seed(3)
    want = generate(tiny_model(attention="eager"), inputs, dropping_cache(policy, 2), max_new_tokens=50, **options)
    assert torch.equal(out, want)
    assert cache.stats().evicted > 0
    cache.check_integrity()


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_of_padded_rows_are_those_of_each_row_alone(num_beams):
    policy, model, inputs = SinkRecent(4, 16), tiny_model(), prompt(50, 33)
    out = generate(model, inputs, PagedCache(model.config, policy=policy), max_new_tokens=40, num_beams=num_beams)
    for row, length in enumerate((50, 33)):
        own = unpadded(inputs["input_ids"][row : row + 1, 50 - length :])
        alone = generate(model, own, PagedCache(model.config, policy=policy), max_new_tokens=40, num_beams=num_beams)
        assert torch.equal(alone[0], out[row, 50 - length :])


def test_sampled_rows_and_repeated_prompts_share_blocks_and_give_them_back():
    model, inputs = tiny_model(), prompt(50, 33)
    cache = PagedCache(model.config, policy=SinkRecent(4, 16))
    torch.manual_seed(1)
    generate(model, inputs, cache, max_new_tokens=40, do_sample=True, num_return_sequences=3)
    cache.check_integrity()
    cache.reset()
    assert cache.stats().used_blocks == 0
    assert cache.stats().evicted == 0


def test_a_fork_goes_on_by_itself():
    policy, model = SinkRecent(4, 32), tiny_model()
    cache = PagedCache(model.config, policy=policy)
    text = generate(model, prompt(60), cache, max_new_tokens=50)
    twin = copy.deepcopy(cache)
    assert twin.stats().evicted == cache.stats().evicted > 0
    one = generate(model, unpadded(text), cache, max_new_tokens=50)
    other = generate(model, unpadded(text), twin, max_new_tokens=50)
    assert torch.equal(one, other)
    cache.check_integrity()
    cache.free()
    assert torch.equal(generate(model, unpadded(other), twin, max_new_tokens=20)[:, : other.shape[1]], other)
    twin.check_integrity()
