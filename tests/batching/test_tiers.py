"""With tiers below the device: the tokens of each prompt alone, nobody waits for another's blocks, nothing is left."""

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from hf_kvopt import BatchConfig, Batcher, disable, enable, generate_many
from hf_kvopt.batching.spills import Spills
from hf_kvopt.pool.block_pieces import Piece
from hf_kvopt.prefix.tiers import disk, restore
from hf_kvopt.prefix.tiers.restore import Restore
from tests.batching.texts import BLOCK, PROMPTS, SPECS, alone, expected, model_of, submit_all, text
from tests.helpers import KINDS, tiny_model
from tests.prefix.tiers.stores import on_disk

TIGHT = {"max_rows": 8, "prefill_chunk": 32, "max_tokens": BLOCK * 14, "block_size": BLOCK}
FORMATS = ("paged", "int8", "int4/int4", "int4")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy every row that gives way: what is quicker on this machine decides nothing here."""
    monkeypatch.setattr(Spills, "pays", lambda self, num_blocks: True)


def drained(batcher: Batcher) -> None:
    """Assert that all blocks are free once what is known was let go of."""
    store = batcher._worker.runtime.engine.store
    store.flush()
    batcher.check_integrity()
    with store.lock:
        store.index.evict(10_000)
        assert all(allocator.num_free == allocator.num_blocks for allocator in store.allocators)


def without_background(batcher: Batcher) -> None:
    """Leave all copies to rows that give way."""
    batcher._worker.runtime.engine.scheduler.spills.tiers.spiller._start = lambda new: None


def held_back(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let all that is known lie in the tiers alone; return what tells of a copy that comes back, and what lets it."""
    store = batcher._worker.runtime.engine.store
    begun, hold, original = threading.Event(), threading.Event(), restore._write

    def write(*args: Any) -> Any:
        begun.set()
        assert hold.wait(60)
        return original(*args)

    store.flush()
    with store.lock:
        store.index.evict(10_000)
    monkeypatch.setattr(restore, "_write", write)
    return begun, hold


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_tokens_stay_the_same_where_rows_spill_and_come_back(format: str, kind: str, tmp_path: Path) -> None:
    batcher = Batcher(model_of(kind), format, host_tier="1GiB", disk_tier=tmp_path, **TIGHT)
    tokens = [request.result(60) for request in submit_all(batcher)]
    assert tokens == expected(kind, format)
    stats = batcher.stats
    if kind == "full":
        assert stats.preemptions > 0
        assert stats.restored_blocks > 0
        assert stats.spilled_blocks > 0
    drained(batcher)
    batcher.close()


def test_a_row_that_gave_way_reads_no_whole_block_again() -> None:
    fed = {}
    for tier in (None, "1GiB"):
        with Batcher(model_of("full"), host_tier=tier, **TIGHT) as batcher:
            if tier is not None:
                without_background(batcher)
            tokens = [request.result(60) for request in submit_all(batcher)]
            assert tokens == expected("full", "paged")
            fed[tier] = batcher.stats.computed_tokens
            preemptions = batcher.stats.preemptions
    once = sum(length + new - 1 for length, new in SPECS)
    assert fed["1GiB"] < fed[None]
    # What is read twice: less than a block of each row that gave way, and of each prompt that was found in part.
    assert fed["1GiB"] <= once + preemptions * BLOCK


def test_rows_are_read_again_where_that_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spills, "pays", lambda self, num_blocks: False)
    with Batcher(model_of("full"), host_tier="1GiB", **TIGHT) as batcher:
        batcher._worker.runtime.engine.scheduler.spills.tiers.spiller.keep_on_host = None  # is not called
        assert [request.result(60) for request in submit_all(batcher)] == expected("full", "paged")


def test_the_rule_weighs_bytes_against_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with Batcher(model_of("full"), host_tier="1GiB", **TIGHT) as batcher:
        batcher.submit(PROMPTS[0], max_new_tokens=2).result(60)
        spills = batcher._worker.runtime.engine.scheduler.spills
        assert spills.pays(3), "the first copy tells the rate"
        spills._copied_bytes, spills._seconds = spills.tiers.block_bytes(), 1.0
        spills.seconds_per_token = 2.1 / BLOCK
        assert spills.pays(3), "a block takes 2 s down and up, and 2.1 s to be read"
        spills.note_step(BLOCK, 1.9)
        assert not spills.pays(3)
        spills.note_step(BLOCK, 9.0)
        assert not spills.pays(3), "the quickest step counts"


def test_other_rows_go_on_while_blocks_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = model_of("full"), text(200, seed=3)
    with Batcher(model, host_tier="1GiB", block_size=BLOCK) as batcher:
        first = batcher.submit(long, max_new_tokens=4, do_sample=False).result(60)
        begun, hold = held_back(batcher, monkeypatch)
        late = batcher.submit(long, max_new_tokens=4, do_sample=False)
        assert begun.wait(60)
        other = batcher.submit(PROMPTS[1], max_new_tokens=7, do_sample=False)
        assert other.result(60) == expected("full", "paged")[1], "a row that came later is done before"
        assert not late.is_done
        assert batcher.stats.waiting == 1
        hold.set()
        assert late.result(60) == first == alone(model, long, max_new_tokens=4)
        assert batcher.stats.restored_blocks == 200 // BLOCK
        drained(batcher)


def test_the_lock_is_free_at_every_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batcher = Batcher(model_of("full"), "int8", host_tier="1GiB", disk_tier=tmp_path, **TIGHT)
    without_background(batcher)
    lock, held = batcher._worker.runtime.engine.store.lock, []
    for name in ("read", "write"):
        original = getattr(Piece, name)

        def noted(piece: Piece, *args: Any, original: Any = original) -> Any:
            held.append(lock._is_owned())
            return original(piece, *args)

        monkeypatch.setattr(Piece, name, noted)
    assert [request.result(60) for request in submit_all(batcher)] == expected("full", "int8")
    assert batcher.stats.restored_blocks
    batcher.close()
    assert held
    assert not any(held)


def test_requests_that_end_while_their_blocks_come_back_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = model_of("full"), text(200, seed=3)
    with Batcher(model, host_tier="1GiB", block_size=BLOCK) as batcher:
        batcher.submit(long, max_new_tokens=4, do_sample=False).result(60)
        begun, hold = held_back(batcher, monkeypatch)
        late = batcher.submit(long, max_new_tokens=4, do_sample=False)
        assert begun.wait(60)
        late.cancel()
        batcher.submit(PROMPTS[3], max_new_tokens=3, do_sample=False).result(60)
        hold.set()
        assert late.result(60) == []
        assert late.finish_reason == "cancelled"
        drained(batcher)
    begun.clear(), hold.clear()
    batcher = Batcher(model, host_tier="1GiB", block_size=BLOCK)
    request = batcher.submit(long, max_new_tokens=4, do_sample=False)
    assert len(request.result(60)) == 4
    batcher.close(cancel=True)


@pytest.mark.parametrize("where", ["find", "fill"])
def test_a_text_that_cannot_be_brought_back_is_read_again(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Restore) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Restore, where, fail)
    batcher = Batcher(model_of("full"), host_tier="1GiB", **TIGHT)
    assert [request.result(60) for request in submit_all(batcher)] == expected("full", "paged")
    assert batcher.stats.restored_blocks == 0
    assert "computed anew" in caplog.text
    drained(batcher)
    batcher.close()


def test_many_requests_over_damaged_files_and_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, rng = model_of("full"), random.Random(5)
    texts = [text(30 + 9 * seed, seed // 2) for seed in range(12)]
    settings = {"max_new_tokens": 3, "do_sample": False}
    wanted = [alone(model, tokens, max_new_tokens=3) for tokens in texts]
    original = disk._write

    def write(path: Path, record: Any) -> None:
        if rng.random() < 0.1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, record)
        if rng.random() < 0.1:
            path.write_bytes(path.read_bytes()[:-3])  # a machine that broke down

    monkeypatch.setattr(disk, "_write", write)
    limits = {"host_tier": 60_000, "disk_tier": tmp_path, "disk_limit": 400_000, "max_tokens": BLOCK * 16}
    with Batcher(model, block_size=BLOCK, max_rows=4, prefill_chunk=48, **limits) as batcher:
        errors: list[int] = []

        def ask(seed: int) -> None:
            draws = random.Random(seed)
            for _ in range(40):
                i = draws.randrange(len(texts))
                request = batcher.submit(texts[i], **settings)
                if draws.random() < 0.1:
                    request.cancel()
                tokens = request.result(60)
                if tokens != wanted[i][: len(tokens)] or (request.finish_reason == "length" and len(tokens) != 3):
                    errors.append(i)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert batcher.stats.restored_blocks > 50
        drained(batcher)
    assert not [path for path in on_disk(tmp_path) if path.suffix == ".tmp"]


def test_a_later_batch_finds_the_texts_of_an_earlier_one(tmp_path: Path) -> None:
    prompt = text(150, seed=8)
    settings = {"disk_tier": tmp_path, "block_size": BLOCK, "max_new_tokens": 5, "do_sample": False}
    first = generate_many(tiny_model(), [prompt], **settings)
    assert on_disk(tmp_path)
    computed = []
    original = Restore.fill

    def fill(self: Restore) -> None:
        computed.append(len(self.records))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restore, "fill", fill)
        assert generate_many(tiny_model(), [prompt], **settings) == first
    assert computed == [149 // BLOCK]


def test_enable_hands_the_tiers_to_a_batch(tmp_path: Path) -> None:
    prompt = text(100, seed=8)
    model = enable(tiny_model(), batching=True, disk_tier=tmp_path, host_tier="1MiB", disk_limit="1MiB")
    output = model.generate_batch([prompt], max_new_tokens=4, do_sample=False)
    assert next(iter(output.values())).generated_tokens == alone(disable(model), prompt, max_new_tokens=4)
    assert on_disk(tmp_path)


def test_tiers_that_cannot_work_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"can be found again.*prefix_sharing=False"):
        Batcher(model, host_tier="1GiB", prefix_sharing=False)
    with pytest.raises(ValueError, match="host_tier must fit the machine's memory"):
        enable(model, batching=True, host_tier="4000TiB")
    with pytest.raises(ValueError, match="names the cache and its options itself"):
        enable(model, batching=BatchConfig(), host_tier="1GiB")
    with pytest.raises(ValueError, match="disk_limit caps the files"):
        generate_many(model, [[1, 2]], disk_limit="1GiB")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="disk_tier"):
        generate_many(model, [[1, 2]], disk_tier=tmp_path / "file")
