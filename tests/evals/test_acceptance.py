"""The acceptance eval: rows of sides whose tokens agree, with the figures that belong to them."""

import json
from pathlib import Path

import pytest
import torch

import hf_kvopt
from evals import reference_model
from evals.acceptance.__main__ import main
from evals.acceptance.assistant import of_own_layers

SHORT = ["--shape", "tiny", "--prompts", "2", "--prompt-tokens", "12", "--new-tokens", "6", "--repeats", "1"]


def test_every_side_gets_a_row_at_each_batch_and_temperature(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert main([*SHORT, "--batches", "1", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    ours = [row for row in rows if row["side"] in ("prompt lookup", "lookahead")]
    assert {(row["batch"], row["temperature"]) for row in ours} == {(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)}
    assert {row["batch"] for row in rows if row["side"].startswith("transformers'")} == {1}
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 6 / row["seconds"][0])
    for row in ours:
        # Three steps in a new process are no measure, then two plain ones: some drafts were tried at least.
        assert row["verifications"] + row["plain_steps"] > 0
    assert (tmp_path / "rows.png").stat().st_size > 0


def test_a_missing_head_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--heads", str(tmp_path / "nothing"), "--out", str(tmp_path / "rows.json")])
    assert "cannot load" in capsys.readouterr().err


def test_an_assistant_of_own_layers_drafts_and_says_what_it_is() -> None:
    target, _ = reference_model.load()
    assistant = of_own_layers(target, 4)
    assert assistant.what == "layers 0 2 5 7 of the target's 8, untrained"
    ids = torch.arange(20, 40)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=assistant.model, **options), wanted)
    spec = hf_kvopt.speculative(assistant.model, gamma=2, fallback=False)
    assert torch.equal(target.generate(ids, custom_generate=spec, **options), wanted)
    assert target.config.num_hidden_layers == len(target.model.layers) == 8
