"""The pool's slots are counted rightly, by each way of handing them out."""

import json
from pathlib import Path

import pytest

from evals.fragmentation.__main__ import STRATEGIES, main
from evals.fragmentation.contiguous import Contiguous, StaticBatch
from evals.fragmentation.paged import Paged
from evals.fragmentation.simulate import simulate
from evals.fragmentation.workload import MAX_OUTPUT, MAX_PROMPT, Request, draw

POOL = 4 * (MAX_PROMPT + MAX_OUTPUT)


def request(
    number: int = 0, prompt_len: int = 40, outputs: tuple[int, ...] = (8,), system: int | None = None
) -> Request:
    return Request(number, 0, system, prompt_len, outputs)


def test_every_strategy_gets_a_row_and_block_16_meets_its_bar(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert main(["--requests", "60", "--out", str(out)]) == 0
    rows = {row["strategy"]: row for row in json.loads(out.read_text())}
    assert set(rows) == set(STRATEGIES)
    assert rows["paged 16"]["bar"] == {"most": 0.04, "is_met": True}
    wastes = [rows[f"paged {size}"]["waste"] for size in (8, 16, 32, 64, 128, 256)]
    assert wastes == sorted(wastes)
    assert all(abs(row["reserved"] - row["used"] - row["internal"]) < 1e-6 for row in rows.values())
    assert all(row["peak_reserved"] <= row["pool_tokens"] for row in rows.values())
    assert out.with_suffix(".png").stat().st_size > 1000


def test_the_same_seed_draws_the_same_requests() -> None:
    assert draw(50, 3, 0.5) == draw(50, 3, 0.5) != draw(50, 4, 0.5)
    assert all(
        r.prompt_len == len(r.prompt) <= MAX_PROMPT and max(r.output_lens) <= MAX_OUTPUT for r in draw(300, 0, 1)
    )


def test_blocks_waste_the_end_of_each_sequence() -> None:
    paged = Paged(POOL, 16)
    assert paged.admit(request(prompt_len=33, outputs=(5, 5)))
    assert paged.use(None)[:3] == (66, 96, 0)


def test_samples_share_their_prompt_until_they_write() -> None:
    paged = Paged(POOL, 16, copies_on_write=True)
    paged.admit(request(prompt_len=40, outputs=(5, 5, 5)))
    assert paged.use(None)[:2] == (40, 48)
    paged.step()
    assert paged.use(None)[:2] == (32 + 3 * 9, 32 + 3 * 16)
    paged.allocator.check_integrity()


def test_system_prompts_are_held_once() -> None:
    paged = Paged(POOL, 16, shares_prefixes=True)
    for number in range(3):
        paged.admit(request(number, prompt_len=384 + 10, system=0))
    assert paged.use(None).used == 384 + 3 * 10
    paged.allocator.check_integrity()


@pytest.mark.parametrize("name", STRATEGIES)
def test_whatever_is_put_out_comes_again_and_all_end(name: str) -> None:
    strategy = STRATEGIES[name](POOL)
    simulate(strategy, draw(40, 1, 5.0))
    assert strategy.num_running == 0
    assert strategy.use(None).reserved == 0


def test_pieces_that_lie_scattered_do_not_hold_a_long_request() -> None:
    pool = Contiguous(256, is_max=False)
    for number in range(8):
        pool.admit(request(number, prompt_len=31, outputs=(1 if number % 2 else 20,)))
    pool.step()
    waiting = request(9, prompt_len=100)
    assert not pool.admit(waiting)
    assert pool.use(waiting)[:3] == (4 * 32, 128, 128)


def test_a_static_batch_pads_and_waits_for_its_last_row() -> None:
    batch = StaticBatch(POOL, num_layers=2)
    assert batch.admit(request(0, prompt_len=100, outputs=(2,)))
    assert batch.admit(request(1, prompt_len=10, outputs=(50,)))
    batch.step()
    assert not batch.admit(request(2))
    assert batch.use(None)[:2] == (101 + 11, 2 * 101 * 3 // 2)
    batch.step()
    assert batch.use(None).used == 12
    assert batch.num_running == 1


def test_a_request_that_never_fits_is_named() -> None:
    with pytest.raises(ValueError, match="fits in no empty pool"):
        simulate(Paged(64, 16), [request(prompt_len=100)])
