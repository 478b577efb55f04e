"""Rows of like settings are drawn together, with the tokens that each draws by itself."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import TopPLogitsWarper

from hf_kvopt import Batcher
from hf_kvopt.batching.rules import Rules, rules_for
from hf_kvopt.batching.sampling import draw_alike
from tests.batching.texts import PROMPTS, alone, model_of
from tests.helpers import VOCAB

MODEL = model_of("full")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 30},
    {"top_k": 0, "min_p": 0.05, "temperature": 1.4},
    {"top_k": 0, "typical_p": 0.7},
    {"top_k": 0, "epsilon_cutoff": 0.01},
]


def rules(seed: int, **settings: Any) -> Rules:
    return rules_for(MODEL, PROMPTS[0], seed=seed, **{"do_sample": True, **settings})


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "none")
def test_tokens_are_those_of_each_request_alone(settings: dict) -> None:
    settings = {"do_sample": True, "max_new_tokens": 10, **settings}
    want = []
    for seed, prompt in enumerate(PROMPTS[:3]):
        torch.manual_seed(seed)
        want.append(alone(MODEL, prompt, **settings))
    with Batcher(MODEL) as batcher:
        with batcher._worker._changed:
            requests = [batcher.submit(prompt, seed=seed, **settings) for seed, prompt in enumerate(PROMPTS[:3])]
        assert [request.result(60) for request in requests] == want


def test_settings_that_are_alike_are_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, warp = [], TopPLogitsWarper.__call__

    def counted(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sizes.append(len(scores))
        return warp(self, input_ids, scores)

    monkeypatch.setattr(TopPLogitsWarper, "__call__", counted)
    rows = [rules(0, top_p=0.5), rules(1, top_p=0.9), rules(2, do_sample=False), rules(3, top_p=0.5)]
    drawn = draw_alike(rows, torch.randn(4, VOCAB))
    assert sizes == [2]
    assert [token is not None for token in drawn] == [True, False, False, True]


def test_rows_that_look_at_more_than_their_logits_are_left_alone() -> None:
    class Mine(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise AssertionError("called without its text")

    own = [rules(seed, logits_processor=LogitsProcessorList([Mine()])) for seed in (0, 1)]
    penalized = [rules(seed, repetition_penalty=1.5) for seed in (0, 1)]
    assert draw_alike([*own, *penalized], torch.randn(4, VOCAB)) == [None] * 4


def test_a_row_that_cannot_be_drawn_spoils_no_other() -> None:
    logits = torch.randn(3, VOCAB)
    logits[1] = float("nan")
    plain = {"top_k": 0}
    drawn = draw_alike([rules(seed, **plain) for seed in range(3)], logits)
    assert [token is not None for token in drawn] == [True, False, True]
    for row in (0, 2):
        assert drawn[row] == rules(row, **plain).choose([], logits[row])
