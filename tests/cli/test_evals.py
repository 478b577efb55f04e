"""`python -m hf_kvopt eval`: every eval of the folder, from a checkout and from a wheel."""

import os
import shutil
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_wheel_carries_the_evals_and_runs_them(tmp_path: Path) -> None:
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for folder in ("hf_kvopt", "evals"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What pip does, without its isolated environment, which would need an index.
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    assert not (site / "evals").exists()
    assert not (site / "hf_kvopt/_evals/evals/results").exists()
    command = [sys.executable, "-m", "hf_kvopt", "eval", "why", "--help"]
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hf_kvopt-" in done.stdout  # where its rows go
