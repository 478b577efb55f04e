"""`python -m hf_kvopt eval`: every eval of the folder, from a checkout and from a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_kvopt.cli import evals

ROOT = Path(__file__).resolve().parents[2]


def test_every_eval_of_the_folder_has_its_line() -> None:
    there = {path.stem for path in (ROOT / "evals").glob("*.py")} | {
        path.parent.name for path in (ROOT / "evals").glob("*/__main__.py")
    }
    assert set(evals.EVALS) == there - {"__init__"}


def test_an_eval_runs_and_hands_its_status_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_kvopt", "eval", "memory", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert "--out" in done.stdout
    done = subprocess.run([*command[:-1], "--nosuch"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("name", "said"), [("nosuch", "unknown eval 'nosuch': expected one of equality, speed")])
def test_an_unknown_eval_is_named(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evals.main([name]) == 2
    assert said in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evals, "_NEEDS", ("nosuch_package",))
    assert evals.main(["memory"]) == 2
    assert capsys.readouterr().err == "eval needs nosuch_package: pip install 'hf-kvopt[evals]'\n"


def test_a_wheel_carries_the_evals_and_runs_them(tmp_path: Path) -> None:
    # What pip does with a source folder, without its isolated environment, which would need an index.
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert not list((tmp_path / "site").glob("evals"))
    command = [sys.executable, "-m", "hf_kvopt", "eval", "why", "--help"]
    here = tmp_path / "elsewhere"
    here.mkdir()
    done = subprocess.run(
        command,
        cwd=here,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m hf_kvopt eval why" in done.stdout
