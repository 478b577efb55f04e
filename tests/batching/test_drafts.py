"""Drafts in a batch change no token, go where they are worth most, and stay within their budget."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_kvopt
from hf_kvopt import Batcher, generate_many, speculative
from hf_kvopt.batching.drafts import Acceptance, Drafts
from hf_kvopt.batching.job import Job
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.rules import rules_for
from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession
from tests.batching.texts import BLOCK, PROMPTS, alone, expected, model_of, submit_all, text
from tests.helpers import VOCAB
from tests.speculation.drafters import noisy
from tests.speculation.heads import tiny_head

TIGHT = {"max_rows": 3, "prefill_chunk": 16}
SHORT = {"max_rows": 8, "prefill_chunk": 32, "max_tokens": 16 * 11}


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs on a machine that is busy must not decide whether anything is drafted."""
    monkeypatch.setattr(Drafts, "note_step", lambda *_: None)


def run(kind: str, draft: object, cache: str = "paged", **settings) -> tuple[list[list[int]], object]:
    with Batcher(model_of(kind), cache, draft=draft, block_size=BLOCK, **settings) as batcher:
        requests = submit_all(batcher)
        tokens = [request.result(60) for request in requests]
        batcher.check_integrity()
        stats = batcher.stats
        assert stats.row_blocks == 0
        assert not batcher._worker.runtime.engine.drafts.rows
    assert stats.drafted_tokens == sum(request.stats.drafted_tokens for request in requests)
    assert stats.accepted_tokens == sum(request.stats.accepted_tokens for request in requests)
    return tokens, stats


class Oracle(Drafter):
    """Knows what comes, and errs at every fifth place."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.reads: list[int] = []

    def begin(self, target: object, batch_size: int) -> DraftSession:
        return _OracleSession(self)


class _OracleSession(DraftSession):
    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.text = oracle, []

    def extend(self, read) -> None:
        count = read.counts[0]
        if not self.text:
            self.text = read.tokens[0, :1].tolist()
        assert read.positions[0, :count].tolist() == list(range(len(self.text) - 1, len(self.text) - 1 + count))
        assert self.text[-1] == int(read.tokens[0, 0]), "every token is told once, in order"
        self.text += read.following[0, :count].tolist()

    def propose(self, plan, sample) -> Draft:
        known = next(text for text in self.oracle.texts if text[: len(self.text)] == self.text)
        draft = known[len(self.text) : len(self.text) + plan.gamma]
        draft = [(t + 1) % VOCAB if (len(self.text) + i) % 5 == 0 else t for i, t in enumerate(draft)]
        return Draft(torch.tensor([draft], dtype=torch.long).view(1, len(draft)))

    def select(self, rows) -> None:
        raise AssertionError("a session has one row")


def oracle(kind: str, format: str = "paged") -> Oracle:
    return Oracle([prompt + tokens for prompt, tokens in zip(PROMPTS, expected(kind, format), strict=True)])


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("settings", [TIGHT, SHORT], ids=["three rows", "eleven blocks"])
@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_tokens_are_those_without_drafts_in_fewer_steps(kind: str, settings: dict) -> None:
    tokens, stats = run(kind, oracle(kind), **settings)
    plain, plain_stats = run_plain(kind, **settings)
    assert tokens == plain == expected(kind, "paged")
    assert stats.accepted_tokens > 20
    assert stats.steps < plain_stats.steps


def run_plain(kind: str, **settings) -> tuple[list[list[int]], object]:
    with Batcher(model_of(kind), **settings) as batcher:
        requests = submit_all(batcher)
        return [request.result(60) for request in requests], batcher.stats


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("format", ["int8", "int4", "k8v4"])
def test_refused_drafts_leave_no_trace_in_quantized_blocks(format: str) -> None:
    tokens, stats = run("full", oracle("full", format), format, **TIGHT)
    assert tokens == expected("full", format)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


DRAFTS = {
    "prompt_lookup": lambda: "prompt_lookup",
    "lookahead": lambda: "lookahead",
    "assistant": lambda: noisy("full"),
    "eagle3": lambda: tiny_head("eagle3"),
    "eagle1": lambda: tiny_head("eagle1"),
    "medusa": lambda: tiny_head("medusa"),
}


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("name", DRAFTS)
def test_every_drafter_serves_a_batch(name: str) -> None:
    tokens, stats = run("full", speculative(DRAFTS[name]()), **SHORT)
    assert tokens == expected("full", "paged")
    assert stats.drafted_tokens > 0
    if name == "assistant":
        assert stats.accepted_tokens > 0


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("name", ["assistant", "eagle3"])
def test_a_row_that_gave_way_drafts_again(name: str) -> None:
    prompts = [text(30, seed) for seed in range(3)]
    want = [alone(model_of("full"), prompt, max_new_tokens=60) for prompt in prompts]
    with Batcher(model_of("full"), draft=DRAFTS[name](), max_tokens=16 * 9) as batcher:
        with batcher._worker._changed:
            requests = [batcher.submit(prompt, max_new_tokens=60, do_sample=False) for prompt in prompts]
        assert [request.result(60) for request in requests] == want
        assert batcher.stats.preemptions > 0
        batcher.check_integrity()


@pytest.mark.usefixtures("untimed")
def test_sampled_tokens_and_processors_do_not_see_drafts() -> None:
    calls = []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls.append(input_ids.shape[1])
            return scores

    settings = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}
    torch.manual_seed(4)
    want = alone(model_of("full"), PROMPTS[2], **settings)
    others = [text(30, seed) for seed in range(3)]
    with Batcher(model_of("full"), draft=Oracle([PROMPTS[2] + want]), max_rows=1) as batcher:
        request = batcher.submit(
            PROMPTS[2], seed=4, logits_processor=LogitsProcessorList([Counts()]), logprobs=0, **settings
        )
        assert request.result(60) == want
        assert request.stats.accepted_tokens > 5
        assert len(request.logprobs) == 25
    assert calls == list(range(len(PROMPTS[2]), len(PROMPTS[2]) + 25))
    with Batcher(model_of("full"), draft="prompt_lookup") as batcher:
        for other in others:
            batcher.submit(other, max_new_tokens=30)
        assert batcher.submit(PROMPTS[2], seed=4, **settings).result(60) == want


def test_an_end_inside_of_a_draft_ends_the_row_there() -> None:
    tokens = expected("full", "paged")[6]
    end = tokens[9]
    known = Oracle([PROMPTS[6] + tokens])
    with Batcher(model_of("full"), draft=known) as batcher:
        request = batcher.submit(PROMPTS[6], max_new_tokens=40, do_sample=False, eos_token_id=end)
        assert request.result(60) == tokens[: tokens.index(end) + 1]
        batcher.check_integrity()


def jobs_with(rates: list[float], left: int = 50) -> tuple[Drafts, list[Job]]:
    model = model_of("full")
    drafts = Drafts(speculative("prompt_lookup").drafter, model)
    jobs = []
    for number, rate in enumerate(rates):
        rules = rules_for(model, [5, 6], max_new_tokens=left, do_sample=False)
        job = Job(Request([5, 6]), rules, (0.0, number))
        drafts.join(job, 0, None)
        for _ in range(40):
            drafts.rows[job].acceptance.note(10, round(10 * rate))
        jobs.append(job)
    return drafts, jobs


def test_a_row_that_gains_little_drafts_little_and_the_step_is_bounded() -> None:
    drafts, jobs = jobs_with([0.8, 0.5, 0.02, 0.8])
    for _ in range(4):
        drafts.note_step(4, 1.0)
        drafts.note_step(20, 1.2)
    depths = drafts.depths(jobs)
    assert depths[0] == depths[3] > depths[1] > depths[2]
    assert sum(depths) <= 16
    drafts.budget = 3
    assert drafts.depths(jobs) == [2, 0, 0, 1]


def test_nothing_is_drafted_where_tokens_cost_as_much_as_steps() -> None:
    drafts, jobs = jobs_with([0.7, 0.6])
    for _ in range(4):
        drafts.note_step(2, 1.0)
        drafts.note_step(8, 4.0)
    assert drafts.depths(jobs) == [0, 0]


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    drafts, jobs = jobs_with([1.0], left=3)
    assert drafts.depths(jobs) == [2]


def test_acceptance_falls_back_to_what_is_known_of_others() -> None:
    known = Acceptance()
    assert known.rate(0.3) == pytest.approx(0.3)
    known.note(8, 8)
    assert 0.6 < known.rate(0.3) < 0.8
    for _ in range(60):
        known.note(0, 0)
    assert known.rate(0.3) == pytest.approx(0.3, abs=0.01)


def test_drafts_of_enable_go_into_generate_batch() -> None:
    model = hf_kvopt.enable(noisy("full", 0.0), draft="prompt_lookup", batching=True)
    outputs = generate_many(model, PROMPTS[:3], max_new_tokens=20, do_sample=False, draft="prompt_lookup")
    assert outputs == [alone(model_of("full"), prompt, max_new_tokens=20) for prompt in PROMPTS[:3]]
    manager = model.init_continuous_batching()
    manager.start()
    assert manager.batcher._worker.runtime.engine.drafts is not None
    manager.stop()


def test_a_drafter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown drafter"):
        Batcher(model_of("full"), draft="prompt_lookups")
