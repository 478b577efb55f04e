"""Ahead-of-time compilation: the record stands for what the library would choose today, and a bad kernel is red."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")

from evals import kernels
from evals.gpu.cases import Case, launches_of, sweep
from evals.gpu.compile import CARDS, Compiled, signature_of
from hf_kvopt.kernels.triton.configs import _FLASH_PREFILL, _PAGED_DECODE, _PAGED_PREFILL
from hf_kvopt.kernels.triton.launch import family_of

RECORD = json.loads(kernels.RESULTS.read_text())["rows"]
GOOD = Compiled(200, 0, 100 << 10, {"HGMMA": 64}, 1, 3000, 500)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")


def cases_of(name):
    """Return the card and (case, launch) of each kernel of the sweep, by the first case that comes to it."""
    card, first = CARDS[name], {}
    for case in sweep(name != "sm_80", True):
        for launch in launches_of(case, card.target):
            first.setdefault(repr((launch.kernel, signature_of(launch), launch.options)), (case, launch))
    return card, list(first.values())


@pytest.mark.parametrize("name", kernels.DEFAULT_CARDS)
def test_the_record_holds_every_case_with_the_tile_of_today_and_no_complaint(name):
    card, cases = cases_of(name)
    compiled = {
        (row["case"], *row.get("tile", []), row["warps"], row["stages"]): row for row in RECORD if row["card"] == name
    }
    for case, launch in cases:
        tile = [launch.args[size] for size in ("BLOCK_M", "BLOCK_N") if size in launch.args]
        row = compiled.get((case.label.strip(), *tile, launch.options["num_warps"], launch.options.get("num_stages")))
        assert row is not None, f"not compiled: {name} {case.label} {tile} {launch.options}; run evals.kernels --all"
        assert row["wrong"] == []
        assert row["spill_bytes"] == 0
        assert row["shared_bytes"] <= card.shared_per_block


@pytest.mark.parametrize("name", kernels.DEFAULT_CARDS)
def test_every_column_of_the_tables_is_swept(name):
    card, cases = cases_of(name)
    tables = {"paged_decode": _PAGED_DECODE, "paged_prefill": _PAGED_PREFILL, "flash_prefill": _FLASH_PREFILL}
    for op, table in tables.items():
        tiles = {(*launch.options.values(), launch.args["BLOCK_N"]) for case, launch in cases if case.op == op}
        for config in table[card.target.family]:
            assert (*config.options.values(), config.block_n) in tiles, (op, config)


def test_cards_with_99_kib_of_shared_memory_take_tiles_that_fit():
    assert family_of((8, 9)) == family_of((8, 0)) == "sm80"
    assert max(row["shared_bytes"] for row in RECORD if row["card"] == "sm_80") <= CARDS["sm_89"].shared_per_block


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 228 << 10}, "needs 233472 of 232448 bytes of shared memory"),
        ({"matrix": {"HMMA": 64}}, "no HGMMA in the machine code"),
    ],
    ids=["good", "spill", "shared memory", "warp-level products"],
)
def test_what_is_wrong_with_a_kernel_is_said(change, complaint):
    card, case = CARDS["sm_90"], Case("flash_prefill", q_len=4096)
    found = kernels.complaints(case, launches_of(case, card.target)[0], GOOD._replace(**change), card)
    assert found == ([] if complaint is None else [complaint])


@pytest.mark.parametrize("name", kernels.DEFAULT_CARDS)
def test_one_kernel_is_really_compiled_for_each_card_and_its_machine_code_read(name):
    card, case = CARDS[name], Case("flash_prefill", 64, 64, q_len=4096)
    row = kernels.row_of(case, launches_of(case, card.target)[0], card, "")
    assert row["wrong"] == []
    assert sum(row["matrix"].get(instruction, 0) for instruction in card.matrix) >= 4
    assert 32 < row["registers"] <= 512
    assert row["loop_instructions"] > 100


def test_small_tiles_and_float32_ask_for_other_instructions():
    card = CARDS["sm_90"]
    wanted = {
        case: kernels.expected_matrix(case, launches_of(case, card.target)[0], card)
        for case in (Case("paged_decode"), Case("paged_decode", dtype=torch.float32), Case("store_kv"))
    }
    assert list(wanted.values()) == [("HMMA",), (), ()]


def test_a_kernel_that_does_not_compile_is_a_red_row_and_exit_status(monkeypatch, capsys):
    def refuse(launch, card):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(kernels, "compile_launch", refuse)
    monkeypatch.setattr(kernels, "launch_key", lambda launch, card: "unknown")
    assert kernels.main(["--card", "sm_90", "--op", "merge_state"]) == 1
    assert "does not compile: ptxas died" in capsys.readouterr().out
