"""The needle eval plants what it asks for where it says, and scores nothing but the answer."""

import json
from pathlib import Path

import pytest
import torch

from evals._common.models import Subject
from evals._common.reading import Scores
from evals._common.shapes import random_model
from evals._common.sides import Side
from evals.needle.__main__ import _cell, main
from evals.needle.prompts import Prompts, make_prompts

SHORT = ["--contexts", "24", "40", "--depths", "3", "--samples", "2", "--chunk", "7"]
LOSSY = "tests.evals.lossy_caches"


class Bytes:
    """A tokenizer of bytes."""

    bos_token_id = 1

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [byte + 3 for byte in text.encode()]}


def text_of(ids: torch.Tensor) -> str:
    return bytes(i - 3 for i in ids.tolist()).decode()


def short_run(out: Path, *arguments: str) -> list[dict]:
    assert main([*SHORT, "--shape", "tiny", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def bytes_subject() -> Subject:
    return Subject("bytes", random_model("tiny"), Bytes())  # type: ignore[arg-type]


def test_every_cell_of_a_sample_asks_for_the_same_planted_value() -> None:
    prompts = make_prompts(bytes_subject(), ["hay " * 99], "assignment", [100, 160], [0.0, 0.5, 1.0], 3, seed=0)
    assert [(p.context, p.depth) for p in prompts] == [(c, d) for c in (100, 160) for d in (0.0, 0.5, 1.0)]
    values = []
    for each in prompts:
        assert each.ids.shape == (3, each.context)
        assert each.ids[:, 0].tolist() == [1, 1, 1]
        texts = [text_of(row[1:]) for row in each.ids]
        answers = [text[-length:] for text, length in zip(texts, each.answer_lens, strict=True)]
        for text, answer in zip(texts, answers, strict=True):
            name, _, value = text.rpartition("\n")[2].partition(" = ")
            assert value == f"'{answer}"
            assert text.count(f"\n{name} = '{answer}\n") == 1
        values.append(answers)
    assert len(set(values[0])) == 3
    assert all(answers == values[0] for answers in values)


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.02), (0.5, 0.3, 0.5), (1.0, 0.7, 1.0)])
def test_depth_is_where_the_needle_lies(depth: float, low: float, high: float) -> None:
    prompts = make_prompts(bytes_subject(), ["hay " * 99], "passkey", [400], [depth], 1, seed=0)
    text = text_of(prompts[0].ids[0, 1:])
    assert text.count("\nThe pass key is ") == 1
    assert low <= text.index("\nThe pass key") / len(text) <= high
    key = text.rsplit("is ", 1)[1]
    assert f"Remember it. {key} is the pass key." in text


def test_only_the_answer_counts() -> None:
    right = torch.tensor([[False, False, True, True], [True, True, True, False]])
    nll = torch.tensor([[9.0, 9.0, 1.0, 3.0], [9.0, 9.0, 9.0, 4.0]])
    scores = Scores(nll, torch.zeros_like(nll), torch.ones_like(right), right)
    prompts = Prompts(5, 0.5, torch.zeros(2, 5, dtype=torch.int64), [2, 1])
    cell = _cell(Side("dynamic", "sdpa"), prompts, scores)
    assert (cell.token_accuracy, cell.exact, cell.log_likelihood) == (0.5, 0.5, -3.0)


def test_a_cache_that_keeps_all_finds_what_the_baseline_finds(tmp_path: Path) -> None:
    baseline, paged, rounded = short_run(tmp_path / "rows.json", "--sides", "paged+hf_kvopt", f"{LOSSY}:rounded+sdpa")
    assert len(paged["cells"]) == 2 * 3
    for ours, theirs in zip(paged["cells"], baseline["cells"], strict=True):
        assert ours["token_accuracy"] == theirs["token_accuracy"]
        assert ours["log_likelihood"] == pytest.approx(theirs["log_likelihood"], abs=1e-4)
    assert abs(rounded["log_likelihood"] - baseline["log_likelihood"]) > 1e-4
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"
    for field in ("revision", "date", "device", "task", "chunk", "samples"):
        assert paged[field] not in (None, "")


def test_a_model_from_the_hub_is_asked_for_a_passkey(tmp_path: Path, model_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--contexts", "140", "--depths", "2", "--samples", "1", "--sides", "int4+hf_kvopt"]
    assert main(["--model", str(model_path), *arguments, "--out", str(out)]) == 0
    assert [row["task"] for row in json.loads(out.read_text())] == ["passkey"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "tiny", "--contexts", "9"], "room for a needle of 16 tokens: got 9"),
        (["--depths", "1"], "at least 2, got 1"),
        (["--task", "haystack"], "'haystack'"),
        (["--sides", "int5+sdpa"], "unknown cache 'int5'"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err
