"""The prefix examples run, and what they print shows that prompts are computed once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_an_agent_and_branches_know_their_past(tmp_path: Path) -> None:
    turns = re.findall(r"(\d+) tokens in the prompt, +(\d+) of them known", run("prefix_chat.py", folder=tmp_path))
    lengths, known = zip(*((int(a), int(b)) for a, b in turns), strict=True)
    assert len(turns) == 8
    assert known[0] == 0
    # Each later turn lacks what was said since, and the last token of the answer before.
    assert all(length - 16 <= k for length, k in zip(lengths[1:6], known[1:6], strict=True))
    assert known[7] >= lengths[7] - 1


def test_documents_and_few_shot_batches_are_read_once(tmp_path: Path) -> None:
    printed = run("prefix_documents.py", "--document-tokens", "400", folder=tmp_path)
    assert "the same answer from the loaded store: True" in printed
    known, all_tokens = map(int, re.search(r"known: (\d+) of (\d+)", printed).groups())
    assert known > all_tokens // 3
