"""Rows that begin alike read their beginning together, and every token is that of plain transformers."""

import pytest
import torch

from hf_kvopt import PagedCache, QuantizedPagedCache, enable, generate_many
from hf_kvopt.kernels.cpu import paged_attention
from hf_kvopt.kernels.cpu.program import can_compile
from tests.helpers import NEW_TOKENS, eager_tokens, generate, prompt, tiny_model
from tests.prefix.prefixes import batch, eager, text

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """The calls that read tokens for several rows at once: (runs of rows, tokens of the longest)."""
    seen = []
    attend_shared = paged_attention._attend_shared

    def count(shared, *rest):
        seen.append((len(shared.tokens), shared.most))
        attend_shared(shared, *rest)

    monkeypatch.setattr(paged_attention, "MIN_SAVED_BYTES", 0)
    monkeypatch.setattr(paged_attention, "_attend_shared", count)
    return seen


@pytest.mark.parametrize("lengths", [(150,), (150, 99), (90, 150, 20)], ids=str)
def test_beams_read_what_they_come_from_together(lengths, shared):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20}
    tokens = generate(tiny_model(), prompt(*lengths), PagedCache(), **options)
    assert torch.equal(tokens, eager_tokens("full", *lengths, **options))
    assert (len(lengths), max(lengths) // 64 * 64) in shared


@pytest.mark.parametrize("options", [{}, {"draft": "prompt_lookup"}], ids=["plain", "drafts"])
def test_prompts_with_one_beginning_read_it_together(options, shared):
    """Rows end at unlike lengths and are padded; each answer is that of the prompt alone."""
    model = enable(tiny_model(), prefix_sharing=True, **options)
    prompts = [text(140, seed=7) + text(length, seed=length) for length in (3, 20, 9)]
    for _ in range(2):
        got = generate(model, batch(*prompts))
        assert torch.equal(got, eager("full", batch(*prompts)))
    assert (1, 128) in shared


def test_samples_of_one_prompt_read_it_together(shared):
    options = {"do_sample": True, "num_return_sequences": 4}
    torch.manual_seed(3)
    want = eager("full", batch(text(150)), **options)
    torch.manual_seed(3)
    got = generate(enable(tiny_model(), prefix_sharing=True), batch(text(150)), **options)
    assert torch.equal(got, want)
    assert (1, 128) in shared


def test_batched_requests_with_one_beginning_read_it_together(shared):
    prompts = [text(140, seed=7) + text(length, seed=length) for length in (3, 20, 9, 14)]
    want = [eager("full", batch(each))[0, len(each) :].tolist() for each in prompts]
    model = tiny_model()
    assert generate_many(model, prompts, max_new_tokens=NEW_TOKENS, do_sample=False, max_rows=4) == want
    assert any(most >= 128 for _, most in shared)


@pytest.mark.parametrize("fmt", ["int8", "fp8_e4m3", "int8/int4"])
def test_no_bit_of_a_quantized_cache_depends_on_what_is_shared(fmt, shared, monkeypatch):
    options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    results = []
    for _ in range(2):
        results.append(generate(tiny_model(), prompt(150), QuantizedPagedCache(format=fmt), **options))
        assert bool(shared) == (len(results) == 1)
        shared.clear()
        monkeypatch.setattr(paged_attention, "MIN_SAVED_BYTES", 1 << 40)
    with_runs, without = results
    assert torch.equal(with_runs.sequences, without.sequences)
    assert all(torch.equal(a, b) for a, b in zip(with_runs.scores, without.scores, strict=True))
