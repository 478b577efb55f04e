"""Rows in, rows with completions out: equal to lone requests, whatever rows they are computed with."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from evals.reference_model import MODEL_PATH
from hf_kvopt import Completer, generate_many
from tests.helpers import tiny_model

PROMPTS = [[5, 6, 7], [9] * 30, [4, 3], [11, 12, 13, 14] * 6]
GREEDY = {"max_new_tokens": 6, "do_sample": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_get_the_tokens_of_lone_requests_in_order() -> None:
    model = tiny_model()
    with Completer(model, max_rows=2, **GREEDY) as completer:
        rows = completer({"id": list("abcd"), "input_ids": PROMPTS})
    assert rows["completion"] == generate_many(model, PROMPTS, **GREEDY)  # type: ignore[arg-type]
    assert rows["num_tokens"] == [6] * 4
    assert rows["finish_reason"] == ["length"] * 4
    assert rows["error"] == [""] * 4
    assert (rows["id"], rows["input_ids"]) == (list("abcd"), PROMPTS)


def test_samples_depend_on_the_number_of_a_row_alone() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    with Completer(tiny_model(), **settings) as completer:
        together = dict(completer.complete(enumerate(PROMPTS)))
        apart = {}
        for number in (2, 0, 3, 1):
            apart |= completer.complete([(number, PROMPTS[number])])
    assert together == apart
    assert len({tuple(tokens) for row in together.values() for tokens in row["completion"]}) == 8
    assert together[1]["num_tokens"] == [6, 6]


def test_rows_of_one_prompt_have_samples_of_their_own() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "temperature": 3.0}
    with Completer(tiny_model(), **settings) as completer:
        rows = completer({"input_ids": [PROMPTS[0]] * 3})
    assert len({tuple(tokens) for samples in rows["completion"] for tokens in samples}) == 6


def test_a_row_that_cannot_be_used_has_an_error_and_the_others_go_on() -> None:
    prompts = [PROMPTS[0], [], [1, 500], None, "text", PROMPTS[1], list(range(90))]
    with Completer(tiny_model(), max_tokens=64, **GREEDY) as completer:
        rows = completer({"input_ids": prompts})
    assert [not error for error in rows["error"]] == [True, False, False, False, False, True, False]
    assert rows["num_tokens"] == [6, 0, 0, 0, 0, 6, 0]
    assert "token ids must be from 0 to 96: got 1 to 500" in rows["error"][2]
    assert "raise max_tokens" in rows["error"][6]


def test_a_processor_that_raises_ends_its_row_alone() -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids[0, 0] == 9:
            raise RuntimeError("mine")
        return scores

    with Completer(tiny_model(), logits_processor=LogitsProcessorList([fail]), **GREEDY) as completer:
        rows = completer({"input_ids": PROMPTS})
    assert rows["error"] == ["", "RuntimeError: mine", "", ""]


def test_datasets_map_takes_it() -> None:
    table = Dataset.from_dict({"prompt": ["import os\n", "def add(a, b):\n", None, "class A:\n"], "id": [3, 1, 2, 0]})
    with Completer(str(MODEL_PATH), **GREEDY) as completer:
        done = table.map(completer, batched=True, batch_size=2)
    assert done["id"] == [3, 1, 2, 0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    inputs = tokenizer(table["prompt"][1], return_tensors="pt")
    tokens = model.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :]
    assert done["completion"][1] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert done["completion"][2] == ""
    assert "a prompt is a text" in done["error"][2]


def test_settings_and_columns_that_cannot_work_are_refused_first() -> None:
    model = tiny_model("full", "eager")
    for settings in ({"nosuch": 1}, {"cache": "int9"}, {"num_return_sequences": 0}, {"num_beams": 4}):
        with pytest.raises((ValueError, TypeError)):
            Completer(model, **settings)  # type: ignore[arg-type]
    assert model.config._attn_implementation == "eager"
    with Completer(model, **GREEDY) as completer:
        with pytest.raises(ValueError, match="rows need a column with their prompts"):
            completer({"id": [1]})
        with pytest.raises(ValueError, match=r"got rows that have \['error'\] already"):
            completer({"input_ids": [[1]], "error": [None]})
        assert completer({"input_ids": []})["completion"] == []
    assert model.config._attn_implementation == "eager"


def test_ray_data_takes_it() -> None:
    ray = pytest.importorskip("ray.data", reason="pip install 'ray[data]'")
    rows = ray.from_items([{"prompt": text} for text in ("import os\n", "class A:\n", "x = [\n")])
    options = {"fn_constructor_args": [str(MODEL_PATH)], "fn_constructor_kwargs": GREEDY, "concurrency": 1}
    done = {row["prompt"]: row["completion"] for row in rows.map_batches(Completer, batch_size=2, **options).take_all()}
    with Completer(str(MODEL_PATH), **GREEDY) as completer:
        want = completer({"prompt": list(done)})
    assert list(done.values()) == want["completion"]
