"""A thousand spills and restores in threads, while files are damaged: nothing wrong is served, no block is lost."""

import threading
from pathlib import Path

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, PrefixStore
from tests.helpers import tiny_model
from tests.prefix.prefixes import batch, text
from tests.prefix.tiers.stores import on_disk

CYCLES, THREADS = 1000, 4


@pytest.mark.slow
def test_threads_that_spill_and_restore_never_get_a_wrong_token(tmp_path: Path, one_thread: None) -> None:
    model = tiny_model()
    texts = [text(40 + 7 * seed, seed=seed // 2) for seed in range(14)]  # pairs that begin alike
    expected = [model.generate(**batch(tokens), max_new_tokens=2, do_sample=False) for tokens in texts]
    store = PrefixStore(model, max_tokens=900, host_tier=200_000, disk_tier=tmp_path, disk_limit=600_000)
    errors: list[str] = []
    stop = threading.Event()

    def serve(seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        for _ in range(CYCLES // THREADS):
            i = int(torch.randint(0, len(texts), (1,), generator=draws))
            cache = store.cache(**batch(texts[i]))
            output = model.generate(**batch(texts[i]), **{CACHE_KEYWORD: cache}, max_new_tokens=2, do_sample=False)
            if not torch.equal(output, expected[i]):
                errors.append(f"text {i}")
            store.commit(cache, output)

    def damage() -> None:
        draws = torch.Generator().manual_seed(99)
        while not stop.wait(0.02):
            with store.lock:
                store.index.evict(8)
            for path in on_disk(tmp_path)[:3]:
                try:
                    whole = path.read_bytes()
                    place = int(torch.randint(0, max(1, len(whole)), (1,), generator=draws))
                    path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
                except OSError:
                    continue  # removed meanwhile

    vandal = threading.Thread(target=damage)
    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(THREADS)]
    for thread in (vandal, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    vandal.join()
    store.flush()
    store.check_integrity()
    stats = store.stats()
    assert errors == []
    assert stats.restored > 300
    assert stats.host_bytes <= 200_000
    store.index.evict(10_000)
    store.check_integrity()
    assert all(allocator.num_free == allocator.num_blocks for allocator in store.allocators)
