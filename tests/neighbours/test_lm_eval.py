"""lm-evaluation-harness: an enabled model inside of HFLM scores and generates as without."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from evals.reference_model import MODEL_PATH
from hf_kvopt import KV_FORMATS

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'hf-kvopt[neighbours]'")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
instance = pytest.importorskip("lm_eval.api.instance")
pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXTS = ["import os\n", "def add(a, b):\n    return", "class Stack:\n    def __init__(self):\n", "for i in range("]
ENDS = [" a + b", " os.path", "self.items = []", "10):\n"]


def requests(kind: str) -> list[Any]:
    if kind == "generate_until":
        arguments: list[Any] = [
            (text, {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}) for text in CONTEXTS
        ]
    else:
        arguments = [(text, end) for text in CONTEXTS for end in ENDS]
    return [instance.Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL_PATH)


def scored(model: Any, tokenizer: Any) -> tuple[list[str], list[tuple[float, bool]]]:
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    answers = harness.generate_until(requests("generate_until"), disable_tqdm=True)
    return answers, harness.loglikelihood(requests("loglikelihood"), disable_tqdm=True)


@pytest.mark.parametrize("options", [{}, {"prefix_sharing": True}, {"draft": "prompt_lookup"}])
def test_a_paged_cache_answers_and_scores_as_without(parts: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, tokenizer = parts
    answers, scores = scored(model, tokenizer)
    assert len(set(answers)) == len(CONTEXTS)
    hf_kvopt.enable(model, **options)
    try:
        for _ in range(2):
            got_answers, got_scores = scored(model, tokenizer)
            assert got_answers == answers
            assert [is_greedy for _, is_greedy in got_scores] == [is_greedy for _, is_greedy in scores]
            assert [score for score, _ in got_scores] == pytest.approx([score for score, _ in scores], abs=1e-4)
    finally:
        hf_kvopt.disable(model)


@pytest.mark.parametrize("format", [name for name, fmt in KV_FORMATS.items() if not fmt.is_native])
def test_every_format_scores_within_its_loss(parts: tuple[Any, Any], format: str) -> None:
    model, tokenizer = parts
    answers, scores = scored(model, tokenizer)
    hf_kvopt.enable(model, cache=format)
    try:
        got_answers, got_scores = scored(model, tokenizer)
    finally:
        hf_kvopt.disable(model)
    # Prompts are read as they came, so scores move by what the cache of the prompt itself loses: nothing here.
    assert [score for score, _ in got_scores] == pytest.approx([score for score, _ in scores], abs=0.5)
    assert all(len(got) > 0 for got in got_answers)
    assert len(got_answers) == len(answers)
