"""The GPU eval on a machine without a GPU: the whole run rehearsed, its arithmetic, and what becomes of a red check."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from evals.gpu.bars import bars, markdown
from evals.gpu.jobs import Job, run_jobs
from evals.gpu.states import compare
from evals.gpu.time import Bench
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs

ROOT = Path(__file__).parents[2]
CPU = Bench(torch.device("cpu"), 1, time.monotonic() + 10**6, rehearsal=True)
LIMITS = {"copy_gb_s": 4300.0, "matmul_tflop_s": 780.0}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_leaves_its_rows(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "evals.gpu", "--rehearse", "--tune", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    written = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    rows = written["rows"]
    assert {"revision", "torch", "triton", "transformers", "limits"} <= set(written)
    assert {row["part"] for row in rows} == {"correct", "prefill", "decode", "generate"}
    assert all(row["passed"] for row in rows if "covers" in row)
    reasons = [row for row in rows if "skipped" in row or "error" in row or "unavailable" in row]
    assert not reasons
    (prefill, *_), decode = ([row for row in rows if row.get("bench") == part] for part in ("prefill", "decode"))
    assert {"ours", "sdpa cudnn", "sdpa flash", "flex"} < set(prefill["sides"])
    assert {"native", "int8", "fp8_e4m3", "fp8_e5m2", "int4"} == {row["format"] for row in decode}
    assert all("ms" in row["sides"]["ours"] and row["passed"] for row in (prefill, *decode))
    assert "| decode int4 over bf16 | 3.0 |  | not measured |" in done.stdout


def decode(format_name, ms, length=65536, **extra):
    share = {"sides": {"ours": {"ms": ms, "gb_s": 1.0, "share": 0.93}}}
    row = {"bench": "decode", "batch": 8, "length": length, "format": format_name, "bytes": 2**31, **share}
    return row | {"over_bf16": 1.0 / ms, **extra}


def test_a_figure_is_that_of_the_worst_large_row():
    rows = [
        decode("native", 1.0, over_best_peer=1.2),
        decode("native", 1.0, length=16384, over_best_peer=0.9),
        decode("native", 1.0, length=1024, over_best_peer=0.1, bytes=2**20),
        decode("int4", 0.25), decode("int4", 0.4, length=16384), decode("int4", 1.0, length=1024),
        decode("int8", 0.5), {"bench": "decode", "batch": 8, "length": 16384, "format": "int8", "skipped": "late"},
        {"bench": "prefill", "head_dim": 128, "length": 4096, "sides": {"ours": {"ms": 2.0, "tflop_s": 1.0, "share": 1},
         "sdpa cudnn": {"ms": 2.2}}},
        {"bench": "prefill", "head_dim": 64, "length": 4096, "sides": {"ours": {"ms": 9.0, "tflop_s": 1.0, "share": 1},
         "sdpa cudnn": {"ms": 1.0}}},
        *({"bench": "generate", "side": side, "batch": 8, "prompt": 8192, "tokens_s": speed} for side, speed in
          (("StaticCache compiled", 100.0), ("PagedCache compiled", 120.0))),
    ]  # fmt: skip
    found = {bar.name: (bar.measured, bar.verdict) for bar in bars(rows)}
    assert found["prefill bf16, head_dim 128, causal, from 4k: over cuDNN"] == (1.1, "met")
    assert found["decode bf16, KV from 1 GB: share of the copy"] == (0.93, "met")
    assert found["decode bf16, KV from 1 GB: over the best peer"] == (0.9, "missed")
    assert found["decode int4 over bf16"] == (2.5, "missed")
    # A size that was not measured leaves no figure.
    assert found["decode int8 over bf16"] == (None, "not measured")
    assert found["decode fp8_e4m3 over bf16"] == (None, "not measured")
    assert found["generate(), batch 8, 8k: over StaticCache compiled"] == (1.2, "missed")
    assert "- decode, 8, 16384, int8: late" in markdown(rows, LIMITS)


def attention_with(window):
    """Return what `compare` says of attention over one window where another was asked for."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1024, 64).bfloat16() for _ in range(3))
    pattern = Pattern(0.125, window=500)
    lens = torch.tensor([1024])
    seen, wrong = (visible_pairs(1024, lens, 1024, window=w) for w in (500, window))
    got = attention_reference(q, k, v, wrong, 0.125)
    return compare(CPU._replace(rehearsal=False), got._replace(lse=None), q, k, v, seen, pattern)


def test_a_window_off_by_one_in_500_is_seen():
    assert attention_with(500)["passed"]
    assert not attention_with(501)["passed"]
    assert not attention_with(499)["passed"]


def fine(bench, value):
    return {"value": value, "passed": True}


def broken(bench):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def killed(bench):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(bench):
    time.sleep(600)


@pytest.mark.slow
def test_a_process_that_dies_is_one_red_row_and_the_others_go_on():
    jobs = [Job("killed", killed, (), "x"), Job("broken", broken, (), "y"), Job("warm", broken)]
    jobs += [Job(f"fine {i}", fine, (i,), "z") for i in range(4)]
    rows = {row.get("check", row.get("warm")): row for row in run_jobs(CPU, jobs)}
    assert rows["killed"]["passed"] is False
    assert "exit code -9" in rows["killed"]["error"]
    assert rows["broken"]["passed"] is False
    assert "illegal memory access" in rows["broken"]["error"]
    assert "passed" not in rows["warm"]
    assert [rows[f"fine {i}"]["value"] for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_what_does_not_end_is_skipped_and_its_process_is_gone():
    bench = CPU._replace(deadline=time.monotonic() + 6)
    jobs = [Job("endless", endless, (), "x"), Job("endless too", endless, (), "x"), Job("after", fine, (1,), "y")]
    rows = list(run_jobs(bench, jobs))
    assert [row["check"] for row in rows] == ["endless", "endless too", "after"]
    assert all(row["skipped"] == "out of time" for row in rows)
    assert not multiprocessing.active_children()


def test_without_a_card_nothing_is_measured():
    command = [sys.executable, "-m", "evals.gpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert "Nothing was measured" in done.stdout
