"""Assistants: drafts that end where the assistant is unsure."""

from typing import Any

import pytest
import torch

import hf_kvopt
from tests.helpers import eager_tokens, prompt, tiny_model

NEW = 16


def drafted(threshold: float | None, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    assistant = tiny_model()
    assistant.generation_config.assistant_confidence_threshold = threshold
    spec = hf_kvopt.speculative(assistant, gamma=4, fallback=False)
    got = tiny_model().generate(**prompt(9, 6), custom_generate=spec, max_new_tokens=NEW, do_sample=False, **kwargs)
    return got, spec.stats


@pytest.mark.parametrize("threshold", [None, 0.0, 0.02, 1.0])
def test_a_threshold_changes_no_token(threshold: float | None) -> None:
    got, stats = drafted(threshold)
    assert torch.equal(got, eager_tokens("full", 9, 6, max_new_tokens=NEW))
    assert stats.steps > 0


def test_a_draft_ends_behind_the_first_token_that_is_not_sure() -> None:
    # Nothing is certain to a random model, so each draft is one token; without a threshold all four are right.
    assert len([n for n in drafted(1.0)[1].accepted_by_depth if n]) == 1
    assert len([n for n in drafted(None)[1].accepted_by_depth if n]) == 4
