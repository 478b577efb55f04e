"""`python -m hf_kvopt batch`: a file of prompts, stopped and gone on with, over one process and several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evals.reference_model import MODEL_PATH
from hf_kvopt.__main__ import main

ROOT = Path(__file__).parents[2]
TEXTS = [f"def f{i}(a, b):\n" + "    a += 1\n" * (i % 7) for i in range(24)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def arguments(prompts: Path, output: Path, *options: str) -> list[str]:
    required = ["--model", str(MODEL_PATH), "--input", str(prompts), "--output", str(output)]
    return [*required, "--max-new-tokens", "8", "--device", "cpu", *options]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def launch(*command: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["batch", *command])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("python -m hf_kvopt batch: error: ")
    return said


def test_rows_come_out_in_order_with_their_columns(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert (
        main(["batch", *arguments(prompts, output, "--max-rows", "5", "--cache", "int8", "--host-tier", "64MiB")]) == 0
    )
    rows = rows_of(output)
    assert [row["id"] for row in rows] == [row["index"] for row in rows] == list(range(len(TEXTS)))
    assert [row["prompt"] for row in rows] == TEXTS
    assert all(0 < row["num_tokens"] <= 8 and row["completion"] for row in rows)
    assert f"{len(TEXTS)} rows in" in capsys.readouterr().out
    before = output.stat().st_mtime_ns
    assert main(["batch", *arguments(prompts, output)]) == 0
    assert output.stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_gives(prompts: Path, tmp_path: Path) -> None:
    sampled = ["--settings", '{"do_sample": true, "temperature": 0.9}', "--max-rows", "2", "--max-new-tokens", "40"]
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert main(["batch", *arguments(prompts, whole, *sampled)]) == 0
    process = launch("hf_kvopt", "batch", *arguments(prompts, resumed, *sampled))
    folder = tmp_path / "resumed.jsonl.parts"
    while process.poll() is None and not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    kept = b"".join(path.read_bytes() for path in folder.glob("*.jsonl"))
    assert kept
    assert not resumed.exists()
    assert main(["batch", *arguments(prompts, resumed, *sampled)]) == 0
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_processes_of_torchrun_and_shards_give_what_one_process_gives(prompts: Path, tmp_path: Path) -> None:
    whole, divided, sharded = (tmp_path / f"{name}.jsonl" for name in ("whole", "divided", "sharded"))
    assert main(["batch", *arguments(prompts, whole)]) == 0
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "hf_kvopt.batch")
    assert launch(*torchrun, *arguments(prompts, divided)).wait(120) == 0
    assert divided.read_bytes() == whole.read_bytes()
    assert main(["batch", *arguments(prompts, sharded, "--shard", "1/2")]) == 0
    assert not sharded.exists()
    assert main(["batch", *arguments(prompts, sharded, "--shard", "0/2")]) == 0
    assert sharded.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_processes_that_share_a_model_write_once(prompts: Path, tmp_path: Path) -> None:
    from tests.helpers import tiny_model

    tiny_model("full", "eager").save_pretrained(tmp_path / "model")
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"input_ids": [5, i % 90, 7]}) + "\n" for i in range(9)))
    outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    options = ["--model", str(tmp_path / "model"), "--input", str(ids), "--device", "cpu", "--max-new-tokens", "5"]
    assert main(["batch", *options, "--output", str(outs[0])]) == 0
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "hf_kvopt.batch")
    assert launch(*torchrun, *options, "--output", str(outs[1]), "--tp-size", "2").wait(120) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert len(rows_of(outs[0])[0]["completion"]) == 5


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"id": 1}\n', (), "rows need a column with their prompts"),
        ('{"prompt": "a", "completion": "b"}\n', (), "got rows that have ['completion'] already"),
        ('{"prompt": "a"}\nnot json\n', (), "cannot read rows from --input"),
        ("", (), "cannot read rows from --input"),
        ('{"prompt": "a"}\n', ("--settings", "nosuch"), "must be a JSON object"),
        ('{"prompt": "a"}\n', ("--settings", '{"seed": 1}'), "that have no option of their own"),
        ('{"prompt": "a"}\n', ("--settings", '{"nosuch": 1}'), "nosuch"),
        ('{"prompt": "a"}\n', ("--shard", "2/2"), "must be I/N with I from 0 to N - 1"),
        ('{"prompt": "a"}\n', ("--tp-size", "2"), "--tp-size 2 takes as many processes: got 1"),
        ('{"prompt": "a"}\n', ("--model", "/nosuch"), "cannot load '/nosuch'"),
        ('{"prompt": "a"}\n', ("--max-tokens", "many"), "max_tokens"),
        ('{"prompt": "a"}\n', ("--host-tier", "much"), "host_tier"),
        ('{"prompt": "a"}\n', ("--disk-limit", "1GiB"), "disk_limit caps the files of disk_tier"),
    ],
)
def test_bad_input_is_one_line(
    content: str, options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    assert said in error_of(capsys, *arguments(path, tmp_path / "out.jsonl", *options))


def test_an_output_of_other_rows_and_another_run_are_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("{}\n")
    assert "got 1 lines for 24 rows" in error_of(capsys, *arguments(prompts, output))
    output.unlink()
    assert main(["batch", *arguments(prompts, output, "--shard", "0/4")]) == 0
    assert "seed was 0, is 7" in error_of(capsys, *arguments(prompts, output, "--seed", "7"))
