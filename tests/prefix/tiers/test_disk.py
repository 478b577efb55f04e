"""Files of the disk tier: damaged ones, those of other models, full disks, caps, and processes that are killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvopt import PrefixStore
from hf_kvopt.prefix.tiers import disk
from tests.helpers import tiny_model
from tests.prefix.prefixes import batch, text, turn
from tests.prefix.tiers.stores import LONG, fresh, known, on_disk

ROOT = Path(__file__).parents[3]


def written(folder: Path, **options: Any) -> list[Path]:
    """Write one text to a folder; returns its files."""
    model = tiny_model()
    store = PrefixStore(model, disk_tier=folder, **options)
    turn(store, model, batch(LONG))
    store.free()
    return on_disk(folder)


@pytest.mark.parametrize("how", ["cut off", "changed", "emptied", "other text"])
def test_a_damaged_file_is_removed_and_its_text_computed_anew(how: str, tmp_path: Path) -> None:
    files, expected = written(tmp_path), fresh("full")
    draws = torch.Generator().manual_seed(0)
    for path in files:
        whole = path.read_bytes()
        place = int(torch.randint(0, len(whole), (1,), generator=draws))
        damaged = {
            "cut off": whole[:place],
            "changed": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
            "emptied": b"",
            "other text": files[0].read_bytes() if path != files[0] else files[1].read_bytes(),
        }
        path.write_bytes(damaged[how])
        model = tiny_model()
        store = PrefixStore(model, disk_tier=tmp_path)
        assert torch.equal(known(store, model)[0], expected)
        store.flush()
        assert store.match_length(LONG) >= 192
        path.write_bytes(whole)


def test_no_changed_byte_of_a_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)[0]
    tier, whole = disk.DiskTier(tmp_path, 2**30), path.read_bytes()
    assert tier.get(path) is not None
    for place in {*range(0, len(whole), 37), 0, 7, 8, len(whole) - 1}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert tier.get(path) is None
        assert not path.exists()


@pytest.mark.parametrize("change", ["weights", "one weight", "dtype", "settings", "format", "attention"])
def test_files_of_another_model_are_never_served(change: str, tmp_path: Path) -> None:
    assert len(written(tmp_path)) == 13
    model = tiny_model(seed=1 if change == "weights" else 0)
    if change == "one weight":
        with torch.no_grad():
            model.model.embed_tokens.weight[5, 3] += 1e-3
    if change == "dtype":
        model = model.double()
    if change == "settings":
        model.model.layers[0].input_layernorm.variance_epsilon = 0.5
    if change == "attention":
        model.set_attn_implementation("eager")
    store = PrefixStore(model, disk_tier=tmp_path, format="int8" if change == "format" else None)
    assert store.match_length(LONG) == 0


def test_weights_that_change_and_come_back_find_their_own_files(tmp_path: Path) -> None:
    model = tiny_model()
    store = PrefixStore(model, disk_tier=tmp_path)
    weight = model.model.embed_tokens.weight
    outputs = []
    for value in (0.5, 0.25, 0.5):
        with torch.no_grad():
            weight[5, 3] = value
        outputs.append(known(store, model))
        store.flush()
    assert [computed for _, computed in outputs] == [200, 200, 8]
    assert torch.equal(outputs[0][0], outputs[2][0])


def test_a_model_that_no_file_can_tell_is_served_without_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    store = PrefixStore(model, disk_tier=tmp_path)
    expected = turn(PrefixStore(model), model, batch(LONG))
    assert torch.equal(turn(store, model, batch(LONG)), expected)
    store.flush()
    assert on_disk(tmp_path) == []
    assert "nothing is kept on the disk" in caplog.text


def test_a_full_disk_is_said_once_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "save_file", fail)
    disk._say_once.cache_clear()
    model = tiny_model()
    store = PrefixStore(model, disk_tier=tmp_path)
    expected = fresh("full")
    for _ in range(2):
        assert torch.equal(known(store, model)[0], expected)
        store.flush()
    assert on_disk(tmp_path) == []
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.undo()
    store.index.clear()
    assert torch.equal(known(store, model)[0], expected)
    store.flush()
    assert len(on_disk(tmp_path)) == 13


def test_files_stay_below_the_cap_and_the_oldest_texts_go(tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in written(tmp_path / "one"))
    model = tiny_model()
    store = PrefixStore(model, disk_tier=tmp_path / "many", disk_limit=int(size * 2.6))
    texts = [LONG, *(text(200, seed=seed) for seed in range(4))]
    for tokens in texts:
        turn(store, model, batch(tokens))
        store.flush()
        if tokens is not LONG:
            store.index.clear()
            assert store.match_length(LONG) == 192, "a text that is asked for stays"
    assert sum(path.stat().st_size for path in on_disk(tmp_path / "many")) <= int(size * 2.6)
    assert store.stats().disk_bytes <= int(size * 2.6)
    assert [store.match_length(tokens) == 192 for tokens in texts[:3]] == [True, False, False]


def test_the_host_keeps_its_cap_and_the_beginning_of_texts(tmp_path: Path) -> None:
    model = tiny_model()
    whole = PrefixStore(model, host_tier="1GiB")
    turn(whole, model, batch(LONG))
    whole.flush()
    cap = whole.stats().host_bytes // 2
    store = PrefixStore(model, host_tier=cap)
    turn(store, model, batch(LONG))
    store.flush()
    store.index.clear()
    assert 0 < store.stats().host_bytes <= cap
    assert 0 < store.match_length(LONG) < 192


def test_what_was_never_finished_is_swept_once_it_is_old(tmp_path: Path) -> None:
    folder = written(tmp_path)[0].parent
    old, young = folder / "a.safetensors.1.2.tmp", folder / "b.safetensors.1.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, time.time() - 7200))
    disk.DiskTier(tmp_path, 2**30)
    assert (old.exists(), young.exists()) == (False, True)


_CHILD = """
    import sys
    from pathlib import Path
    from hf_kvopt import PrefixStore
    from tests.helpers import tiny_model
    from tests.prefix.prefixes import batch, text, turn

    model = tiny_model()
    store = PrefixStore(model, disk_tier=Path(sys.argv[1]))
    print("ready", flush=True)
    for seed in range(int(sys.argv[2]), int(sys.argv[3])):
        turn(store, model, batch(text(200, seed=seed)))
"""


def child(folder: Path, first: int, stop: int) -> "subprocess.Popen[str]":
    """Start a process that writes texts of some seeds to a folder."""
    script = [sys.executable, "-c", textwrap.dedent(_CHILD), str(folder), str(first), str(stop)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def test_two_processes_share_a_folder_and_one_that_is_killed_leaves_nothing_wrong(tmp_path: Path) -> None:
    killed, ending = child(tmp_path, 0, 500), child(tmp_path, 2, 5)
    assert ending.wait(timeout=240) == 0  # a process that ends writes what it has queued
    deadline = time.monotonic() + 120
    while len(on_disk(tmp_path)) < 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    model = tiny_model()
    store, plain = PrefixStore(model, disk_tier=tmp_path), PrefixStore(model)
    computed = []
    for seed in range(6):
        output, count = known(store, model, text(200, seed=seed))
        assert torch.equal(output, turn(plain, model, batch(text(200, seed=seed))))
        computed.append(count)
    assert computed[2:5] == [8, 8, 8]
    store.flush()
    tier, files = disk.DiskTier(tmp_path, 2**30), [path for path in on_disk(tmp_path) if path.suffix != ".tmp"]
    assert all(tier.get(path) is not None for path in files)
