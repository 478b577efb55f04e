"""What a policy learned is kept for later processes, and ignored where it is damaged or of something else."""

import json
import logging
from pathlib import Path

import pytest
import torch

from hf_kvopt import speculative
from hf_kvopt.speculation.loop.remembered import Remembered, facts_of
from hf_kvopt.speculation.speculative import SpeculativeDecoding
from tests.helpers import eager_tokens, generate, prompt, tiny_model
from tests.speculation.test_policy import make, simulate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    monkeypatch.setenv("HF_KVOPT_REMEMBER", "1")
    return tmp_path / "speculation"


def spoken(draft: str = "suffix", seed: int = 0) -> SpeculativeDecoding:
    """Generate with a new callable until something was kept, and return it."""
    spec = speculative(draft)
    model = tiny_model(seed=seed)
    for length in (9, 12):
        generate(model, prompt(length), custom_generate=spec, max_new_tokens=120)
    return spec


def test_a_later_process_begins_with_what_was_learned(home: Path) -> None:
    spec = spoken()
    files = list(home.iterdir())
    assert len(files) == 1
    later = speculative("suffix")
    later.remembered.meet(tiny_model())
    assert later.policy.learned()["rates"] == json.loads(files[0].read_text())["learned"]["rates"]
    assert later.policy.read_times
    assert later.policy.read_times.at(1) == pytest.approx(spec.policy.read_times.at(1), rel=5)


def test_the_first_call_is_as_careful_as_later_ones() -> None:
    policy = make()
    simulate(policy, 200, alpha=0.0, draft_s=0.0002, read_s=0.0008)
    cold, warm = make(), make()
    warm.learn(json.loads(json.dumps(policy.learned())))
    tried = [sum(plan.gamma for plan in simulate(p, 48, 0.0, 0.0002, 0.0008)) for p in (cold, warm)]
    assert tried[1] < tried[0] / 2


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"facts": {}}', "null", '{"facts": FACTS, "learned": {}}',
     '{"facts": FACTS, "learned": {"read_s": [[1, -2]], "draft_s": [], "rates": {"passed": [], "widths": []}}}',
     '{"facts": FACTS, "learned": {"read_s": [[1, NaN]], "draft_s": [], "rates": {"passed": [], "widths": []}}}',
     '{"facts": FACTS, "learned": {"read_s": [], "draft_s": [], "rates": {"passed": [[5, 2]], "widths": []}}}',
     '{"facts": FACTS, "learned": {"read_s": [[1, 2], 3], "draft_s": [], "rates": {"passed": [], "widths": []}}}'],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_word_and_written_anew(
    damage: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoken()
    path = next(home.iterdir())
    facts = json.loads(path.read_text())["facts"]
    path.write_text(damage.replace("FACTS", json.dumps(facts)))
    wanted = eager_tokens("full", 9, max_new_tokens=120)
    with caplog.at_level(logging.WARNING):
        spec = speculative("suffix")
        got = generate(tiny_model(), prompt(9), custom_generate=spec, max_new_tokens=120)
    assert torch.equal(got, wanted)
    assert len([r for r in caplog.records if "is ignored" in r.message]) == 1
    generate(tiny_model(), prompt(12), custom_generate=spoken(), max_new_tokens=120)
    assert json.loads(path.read_text())["learned"]["read_s"]


def test_what_is_known_of_another_model_is_not_believed(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoken()
    path = next(home.iterdir())
    kept = json.loads(path.read_text())
    kept["facts"]["config"] = "another"
    path.write_text(json.dumps(kept))
    with caplog.at_level(logging.WARNING):
        later = speculative("suffix")
        later.remembered.meet(tiny_model())
    assert "another model or machine" in caplog.text
    assert not later.policy.read_times
    other = tiny_model()
    other.config.rms_norm_eps = 1e-3
    drafter = later.drafter
    assert facts_of(other, drafter) != facts_of(tiny_model(), drafter)


def test_nothing_is_kept_where_that_is_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KVOPT_REMEMBER", "0")
    spoken()
    assert not home.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HF_KVOPT_REMEMBER", "1")
    assert isinstance(spoken().remembered, Remembered)
