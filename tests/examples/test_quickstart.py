"""The quick start does what its text says, on the bundled model."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"
LINES = ("transformers' default", 'enable(cache="paged")', 'enable(cache="int8")', 'enable(draft="eagle3")')


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_quickstart_shows_the_same_text_and_what_it_costs(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(tmp_path, "--context", "300", "--new-tokens", "8", "--html", str(page))
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells[2:6] for line in done.stdout.splitlines() if len(cells := line.split("│")) == 7}
    assert list(rows) == [*LINES, "prefix_sharing=True"]
    assert all(rows[name][0].strip() == "yes" for name in rows if "int8" not in name)
    megabytes = {name: float(row[3].split()[0]) for name, row in rows.items()}
    assert megabytes['enable(cache="int8")'] < megabytes['enable(cache="paged")'] / 2
    assert "shorter is better" in done.stdout
    assert "Seconds of the second answer" in page.read_text()


def test_quickstart_reads_a_text_of_the_user(tmp_path: Path) -> None:
    text = tmp_path / "notes.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 30)
    done = run(tmp_path, "--text", str(text), "--new-tokens", "4", "--draft", "prompt_lookup")
    assert done.returncode == 0, done.stderr
    assert 'enable(draft="prompt_lookup")' in done.stdout
