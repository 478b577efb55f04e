"""Decoding rows as one compiled step: equal tokens, one graph, no wait and one copy to the device."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from hf_kvopt import Batcher
from hf_kvopt.batching import graph
from hf_kvopt.batching.drafts import Drafts
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.rules import rules_for
from hf_kvopt.batching.settings import BatchConfig, Runtime
from hf_kvopt.kernels import attention
from hf_kvopt.pool.centres import Centres
from tests.batching.test_equality import TIGHT
from tests.batching.test_models import CASES
from tests.batching.texts import PROMPTS, alone, expected, model_of, submit_all, text
from tests.kernels.triton.pretended import pretended
from tests.kernels.triton.test_pretended import llama
from tests.models.tiny import build

pytestmark = pytest.mark.usefixtures("fresh_graphs")
# The quickest to compile: it calls the operations that run without it.
EAGER = CompileConfig(backend="eager", mode=None)


@pytest.mark.parametrize(
    ("kind", "format", "pressure"),
    [
        ("full", "paged", "fourteen blocks"),
        ("mixed", "paged", "three rows"),
        ("sliding", "paged", "fourteen blocks"),
        ("full", "int8", "fourteen blocks"),
    ],
)
def test_tokens_are_those_of_each_prompt_alone(kind: str, format: str, pressure: str) -> None:
    with Batcher(model_of(kind), format, compile=EAGER, **TIGHT[pressure]) as batcher:
        assert [request.result(300) for request in submit_all(batcher)] == expected(kind, format)
        buckets = batcher._worker.runtime.engine.graph.buckets
        batcher.check_integrity()
        assert batcher.stats.row_blocks == 0
    assert 0 < counters["stats"]["unique_graphs"] == len(buckets) <= 8
    assert not counters["graph_break"]


@pytest.mark.parametrize("format", ["paged", "int8"])
@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_the_step_is_right_before_it_is_compiled(kind: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    with Batcher(model_of(kind), format, compile=True, **TIGHT["three rows"]) as batcher:
        assert [request.result(60) for request in submit_all(batcher)] == expected(kind, format)
        assert batcher._worker.runtime.engine.graph.buckets


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_models_are_compiled_with_equal_tokens(name: str) -> None:
    """Soft caps beside windows, sinks, experts; latent attention stays eager."""
    model = build(CASES[name], "eager")
    prompts = [[token % 97 for token in prompt] for prompt in PROMPTS[:3]]
    want = [alone(model, prompt) for prompt in prompts]
    with Batcher(model, compile=EAGER) as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=12, do_sample=False) for prompt in prompts]
        assert [request.result(300) for request in requests] == want
        assert bool(batcher._worker.runtime.engine.graph.buckets) == (name != "deepseek_v3")


def test_tokens_are_equal_by_torchs_operations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_READERS", [r for r in attention.CPU_READERS if r.name != "compiled"])
    with Batcher(model_of("mixed"), max_rows=4, compile=EAGER) as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=12, do_sample=False) for prompt in PROMPTS[:4]]
        assert [request.result(300) for request in requests] == [alone(model_of("mixed"), p) for p in PROMPTS[:4]]
        assert batcher._worker.runtime.engine.graph.buckets


def test_drafts_stay_eager_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(Drafts, "note_step", lambda _, num_tokens, seconds: sizes.append(num_tokens))
    with Batcher(model_of("full"), max_rows=3, compile=EAGER, draft="prompt_lookup") as batcher:
        assert [request.result(300) for request in submit_all(batcher)] == expected("full", "paged")
        assert sum(sizes) == batcher.stats.computed_tokens, "what a step reads is counted, compiled or not"
        assert batcher._worker.runtime.engine.graph.buckets


def test_no_more_graphs_are_made_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_MOST_GRAPHS", 1)
    with Batcher(model_of("full"), compile=EAGER, **TIGHT["three rows"]) as batcher:
        assert [request.result(300) for request in submit_all(batcher)] == expected("full", "paged")
        assert len(batcher._worker.runtime.engine.graph.buckets) == 1


@torch.no_grad()
def test_a_step_waits_for_nothing_and_copies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (2, 4):
        model = llama(layers)
        runtime = Runtime(model, BatchConfig(max_tokens=256, compile=EAGER))
        engine = runtime.engine
        for seed in range(3):
            prompt = [token % 97 for token in text(20 + 9 * seed, seed)]
            rules = rules_for(model, prompt, max_new_tokens=60, do_sample=False)
            engine.add(engine.job(Request(prompt), rules))
        while len(engine.rows.jobs) < 3:
            engine.step()
        step, rows = engine.graph, engine.rows
        assert step is not None
        step._forward = model.forward  # what a card runs: here kernels run by the interpreter
        bucket = step.bucket_for(rows.cache)
        tokens, lengths = [job.text[-1] for job in rows.jobs], rows.lengths
        with pretended(monkeypatch) as costs:
            got = step.read(bucket, rows.cache, tokens, lengths)
        assert costs.syncs == []
        assert len(costs.copies) == 1, costs.copies
        rows.cache.crop(-1)
        want = step.read(bucket, rows.cache, tokens, lengths)
        assert torch.allclose(got, want, atol=1e-4)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        found.append(len(costs.copies))
        runtime.close("cancelled")
    assert found[0] == found[1]


def test_a_new_block_has_the_centre_of_the_one_before() -> None:
    class Table:
        rows = ((4, 2), (3,))

    centres = Centres(1, 8, 5, torch.device("cpu"))
    centres.ids = [0, 0, 7, 5, 0]  # block 2 was another row's
    centres.go_on(Table())  # type: ignore[arg-type]
    assert centres.ids == [0, 0, 0, 5, 0]


@pytest.mark.parametrize("value", ["yes", 3, None])
def test_how_to_compile_is_said_by_a_config(value: object) -> None:
    with pytest.raises(TypeError, match="compile must be True, False or a CompileConfig"):
        Batcher(model_of("full"), compile=value)
