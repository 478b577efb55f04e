"""Speculation over prefix-shared caches: `enable(model, prefix_sharing=True, draft=...)`."""

import copy
from typing import Any

import pytest
import torch

import hf_kvopt
from tests.helpers import KINDS, generate, tiny_model
from tests.prefix.prefixes import batch, text
from tests.speculation.drafters import noisy
from tests.speculation.heads import tiny_head

NEW, SYSTEM = 20, text(70, seed=7)
DRAFTS = {
    "head": lambda kind: tiny_head("eagle3"),
    "compiled head": lambda kind: tiny_head("eagle3 compiled"),
    "assistant": noisy,
    "prompt lookup": lambda kind: "prompt_lookup",
}


def sharing_model(draft: Any, kind: str = "full", **options: Any) -> tuple[Any, Any]:
    spec = hf_kvopt.speculative(draft, gamma=3, fallback=False)
    return hf_kvopt.enable(tiny_model(kind), prefix_sharing=True, draft=spec, **options), spec


def wanted_of(kind: str, inputs: Any) -> torch.Tensor:
    return generate(tiny_model(kind, "eager"), inputs, None, max_new_tokens=NEW)


@pytest.mark.parametrize("rows", [(SYSTEM,), (SYSTEM + text(5), SYSTEM, SYSTEM + text(9))], ids=["batch 1", "batch 3"])
@pytest.mark.parametrize(
    ("draft", "kind"),
    # The tiny heads fit only the tiny Llama.
    [(draft, kind) for draft in DRAFTS for kind in KINDS if kind == "full" or "head" not in draft],
)
def test_warm_and_cold_calls_give_the_tokens_of_plain_decoding(draft: str, kind: str, rows: Any) -> None:
    model, spec = sharing_model(DRAFTS[draft](kind), kind)
    inputs, store = batch(*rows), hf_kvopt.prefix_store(model)
    for call in range(3):
        assert torch.equal(generate(model, inputs, max_new_tokens=NEW), wanted_of(kind, inputs))
        store.check_integrity()
        assert spec.stats.calls == call + 1
    assert spec.stats.steps > 0
    assert store.stats().hits >= 2 * len(rows)


def test_what_was_drafted_and_generated_is_found_by_the_next_turn() -> None:
    model, _ = sharing_model("prompt_lookup")
    first = generate(model, batch(SYSTEM), max_new_tokens=NEW)
    store = hf_kvopt.prefix_store(model)
    assert store.match_length(first[0]) == first.shape[1] - 1
    longer = batch(first[0].tolist() + text(7))
    assert torch.equal(generate(model, longer, max_new_tokens=NEW), wanted_of("full", longer))


def test_quantized_shared_caches_give_the_tokens_of_the_same_cache_without_drafts() -> None:
    plain = hf_kvopt.enable(tiny_model(), cache="int8", prefix_sharing=True)
    drafting, _ = sharing_model(noisy(), cache="int8")
    for inputs in (batch(SYSTEM), batch(SYSTEM + text(6), SYSTEM)):
        assert torch.equal(generate(drafting, inputs, max_new_tokens=NEW), generate(plain, inputs, max_new_tokens=NEW))


def test_a_copy_drafts_for_itself_and_disable_puts_all_back() -> None:
    model, spec = sharing_model("prompt_lookup")
    twin = copy.deepcopy(model)
    inputs = batch(SYSTEM)
    assert torch.equal(generate(twin, inputs, max_new_tokens=NEW), wanted_of("full", inputs))
    assert twin.__dict__["generate"].inner.module is twin
    assert hf_kvopt.prefix_store(model).stats().rows == 0
    hf_kvopt.disable(model)
    assert "generate" not in model.__dict__
    calls = spec.stats.calls
    generate(model, inputs)
    assert spec.stats.calls == calls
