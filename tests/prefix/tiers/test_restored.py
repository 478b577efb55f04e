"""What comes back from a tier gives the tokens of a store that never let go of it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, PrefixStore, disable, enable, prefix_store
from hf_kvopt.pool.block_pieces import Piece
from hf_kvopt.prefix.tiers import spill
from hf_kvopt.prefix.tiers.restore import Restore
from tests.helpers import KINDS, tiny_model
from tests.prefix.prefixes import batch, counted, text, turn
from tests.prefix.tiers.stores import FORMATS, LONG, SEALED, evict_all, fresh, known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_text_comes_back_from_the_host(kind: str, name: str) -> None:
    model = tiny_model(kind)
    store = PrefixStore(model, format=name, host_tier="1GiB")
    expected = fresh(kind, format=name)
    assert torch.equal(turn(store, model, batch(LONG)), expected)
    for _ in range(2):
        evict_all(store)
        assert store.match_length(LONG) == 192
        output, computed = known(store, model)
        assert (torch.equal(output, expected), computed) == (True, 8)
    assert store.stats().restored == 2 * (192 // store.block_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_text_comes_back_from_the_disk_to_a_store_that_computed_nothing(kind: str, name: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    first = PrefixStore(model, format=name, disk_tier=tmp_path)
    turn(first, model, batch(LONG))
    first.free()
    twin = tiny_model(kind)
    store = PrefixStore(twin, format=name, disk_tier=tmp_path, host_tier="1GiB")
    output, computed = known(store, twin)
    assert (torch.equal(output, fresh(kind, format=name)), computed) == (True, 8)
    assert store.stats().host_bytes > 0  # what was read stays at hand


def test_rows_of_a_batch_come_back_beside_what_lies_on_the_device() -> None:
    model = tiny_model("mixed")
    store = PrefixStore(model, host_tier="1GiB")
    texts = [LONG[:120] + text(30, seed=1), text(90, seed=2), LONG[:64] + text(40, seed=3)]
    expected = turn(PrefixStore(model), model, batch(*texts))
    turn(store, model, batch(*texts))
    evict_all(store)
    turn(store, model, batch(LONG[:70]))  # a part of two rows
    assert torch.equal(turn(store, model, batch(*texts)), expected)
    assert store.stats().restored > 64 // 16


def test_a_chat_goes_on_behind_what_came_back() -> None:
    model = tiny_model()
    store, plain = PrefixStore(model, host_tier="1GiB", format=SEALED), PrefixStore(model, format=SEALED)
    tokens, reference = LONG[:130], LONG[:130]
    for seed in range(3):
        tokens = turn(store, model, batch(tokens))[0].tolist() + text(20, seed=seed)
        evict_all(store)
        reference = turn(plain, model, batch(reference))[0].tolist() + text(20, seed=seed)
        assert tokens == reference


def test_enable_takes_the_tiers(tmp_path: Path) -> None:
    model = enable(tiny_model(), prefix_sharing=True, host_tier="1GiB", disk_tier=str(tmp_path), disk_limit="1GiB")
    expected = model.generate(**batch(LONG), max_new_tokens=8, do_sample=False)
    evict_all(prefix_store(model))
    with counted() as forwards:
        assert torch.equal(model.generate(**batch(LONG), max_new_tokens=8, do_sample=False), expected)
    assert forwards[0] == 8
    with pytest.raises(ValueError, match=r"host_tier keep shared prompts.*prefix_sharing=False"):
        enable(disable(model), host_tier="1GiB")


def test_namespaces_stay_apart_below_the_device(tmp_path: Path) -> None:
    model = tiny_model()
    store = PrefixStore(model, disk_tier=tmp_path, host_tier="1GiB")
    for namespace in ("mine", 1):
        cache = store.cache(**batch(LONG), namespace=namespace)
        store.commit(cache, model.generate(**batch(LONG), **{CACHE_KEYWORD: cache}, max_new_tokens=2))
    evict_all(store)
    found = [store.match_length(LONG, namespace=name) for name in ("mine", 1, "1", None, "other", (1,))]
    assert found == [192, 192, 0, 0, 0, 0]


def test_clear_forgets_below_the_device_too(tmp_path: Path) -> None:
    model = tiny_model()
    store = PrefixStore(model, disk_tier=tmp_path, host_tier="1GiB")
    turn(store, model, batch(LONG))
    store.flush()
    store.clear()
    assert store.match_length(LONG) == store.stats().host_bytes == store.stats().disk_bytes == 0
    assert PrefixStore(tiny_model(), disk_tier=tmp_path).match_length(LONG) == 0


def test_a_store_without_room_for_a_text_restores_what_fits() -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB", max_tokens=288)
    texts = [text(150, seed=seed) for seed in range(4)]
    expected = [fresh("full", tokens) for tokens in texts]
    for tokens in texts:
        turn(store, model, batch(tokens))
        store.flush()
    assert store.pin(texts[0][:96]) == 96
    for tokens, output in zip(texts, expected, strict=True):
        assert torch.equal(turn(store, model, batch(tokens)), output)
    assert store.stats().restored > 0


def test_blocks_with_a_copy_go_before_those_that_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB")
    hold, original = threading.Event(), spill.packed
    turn(store, model, batch(text(100, seed=2)))
    store.flush()
    monkeypatch.setattr(spill, "packed", lambda pieces: (hold.wait(30), original(pieces))[1])
    turn(store, model, batch(LONG))
    turn(store, model, batch(text(100, seed=2)))  # used last, but copied
    with store.lock:
        store.index.evict(7)
        waiting = sum(node.waits for node in store.index.nodes())
    hold.set()
    evict_all(store)
    assert waiting == 13
    assert store.match_length(LONG) == 192


def test_what_was_computed_since_it_was_found_does_not_come_back_twice() -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB")
    turn(store, model, batch(LONG))
    evict_all(store)
    one = Restore(store.blocks.tiers, store.key_of(None), LONG)
    one.find()
    assert len(one.records) == 192 // 16
    turn(store, model, batch(LONG[:100]))  # brings six blocks back
    with store.lock:
        assert one.take() == 192 // 16 - 6
    one.fill()
    one.leave()
    store.check_integrity()
    assert store.stats().restored == 192 // 16


def is_free(lock: Any) -> bool:
    """Tell whether another thread can take a lock now."""
    got: list[bool] = []

    def attempt() -> None:
        got.append(lock.acquire(timeout=5))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return got[0]


def test_the_lock_is_never_held_over_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB", disk_tier=tmp_path, format="int8")
    seen: list[bool] = []
    for name in ("read", "write"):
        original = getattr(Piece, name)

        def noted(piece: Piece, *args: Any, original: Any = original) -> Any:
            seen.append(is_free(store.lock))
            return original(piece, *args)

        monkeypatch.setattr(Piece, name, noted)
    turn(store, model, batch(LONG[:50]))
    evict_all(store)
    turn(store, model, batch(LONG[:50]))
    assert len(seen) > 8
    assert all(seen)


def test_pools_that_grow_during_a_copy_do_not_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB")
    expected = turn(store, model, batch(LONG))
    evict_all(store)
    original, grown = Piece.write, []

    def write(piece: Piece, blocks: torch.Tensor) -> None:
        original(piece, blocks)
        if not grown:
            grown.append(True)
            for allocator in store.allocators:
                allocator.extend(allocator.num_blocks + 40)

    monkeypatch.setattr(Piece, "write", write)
    output, computed = known(store, model)
    assert (torch.equal(output, expected), computed) == (True, 8)


@pytest.mark.parametrize("what", ["evicted", "cleared", "grown", "taken by others"])
def test_what_changes_during_a_spill_is_not_kept_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    store = PrefixStore(model, host_tier="1GiB")
    expected, other = fresh("full"), fresh("full", text(200, seed=9))
    original, done = spill.packed, []

    def packed(pieces: Any) -> torch.Tensor:
        if not done:
            done.append(True)
            with store.lock:
                if what in ("evicted", "taken by others"):
                    store.index.evict(10_000)
                if what == "cleared":
                    store.clear()
                if what == "grown":
                    for allocator in store.allocators:
                        allocator.extend(allocator.num_blocks + 40)
            if what == "taken by others":
                assert torch.equal(turn(store, model, batch(text(200, seed=9))), other)
        return original(pieces)

    monkeypatch.setattr(spill, "packed", packed)
    turn(store, model, batch(LONG))
    store.flush()
    evict_all(store)
    assert store.match_length(LONG) == (192 if what == "grown" else 0)
    assert torch.equal(known(store, model)[0], expected)
    assert torch.equal(known(store, model, text(200, seed=9))[0], other)
