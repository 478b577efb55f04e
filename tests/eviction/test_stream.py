"""Texts without end: memory, masks and what a step does stay what they are."""

import gc

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, PagedCache, QuantizedPagedCache, SinkRecent, SinkRecentPeriodic
from tests.eviction.reference import dense_logits
from tests.helpers import prompt, tiny_model

POLICY = SinkRecent(4, 64)


def stream(model, cache, num_tokens, see=None):
    """Feed one token at a time, positions and masks left to the model."""
    x, text = prompt(20)["input_ids"], []
    with torch.inference_mode():
        for _ in range(num_tokens):
            x = model(input_ids=x, **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)
            text.append(int(x))
            if see is not None:
                see()
    return text


def bytes_of_tensors():
    """What the storages of all living tensors take: counted by torch, not by this library."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("kind", [PagedCache, QuantizedPagedCache])
def test_memory_is_flat_and_is_what_stats_say(kind):
    model = tiny_model()
    stream(model, kind(model.config, policy=POLICY), 20)  # kernels keep workspaces from their first call on
    before = bytes_of_tensors()
    cache, blocks, reserved = kind(model.config, policy=POLICY), [], []

    def see():
        stats = cache.stats()
        blocks.append(stats.used_blocks)
        reserved.append(stats.reserved_bytes)

    stream(model, cache, 600, see)
    held = cache.stats()
    assert held.num_tokens <= 16 + 64 + 2 * 16
    assert held.num_tokens + held.evicted == cache.get_seq_length() == 20 + 600 - 1
    # From the moment when the first block was dropped nothing grows: not the blocks, not the pools.
    assert max(blocks[100:]) <= 1 + 64 // 16 + 2
    assert len(set(reserved[200:])) == 1
    assert bytes_of_tensors() - before == pytest.approx(held.reserved_bytes, abs=4096)
    cache.check_integrity()


def test_a_long_prompt_gives_its_memory_back():
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    with torch.inference_mode():
        model(input_ids=prompt(4000)["input_ids"], **{CACHE_KEYWORD: cache})
        whole = cache.stats().reserved_bytes
        model(input_ids=prompt(1)["input_ids"], **{CACHE_KEYWORD: cache})
    assert cache.stats().reserved_bytes < whole / 10
    assert cache.get_mask_sizes(1, 0)[0] <= 16 + 64 + 2 * 16
    cache.check_integrity()


def test_a_stream_is_dense_attention_over_what_is_kept():
    """Positions go on growing with the text: the 400th token stands at position 400, and no key is rotated again."""
    model, cache = tiny_model(), PagedCache(tiny_model().config, policy=POLICY)
    text = torch.tensor([*prompt(20)["input_ids"][0].tolist(), *stream(model, cache, 380)])
    logits = dense_logits(tiny_model(attention="eager"), text, POLICY, [0, *range(20, len(text) + 1)])
    assert torch.equal(logits[19:-1].argmax(-1), text[20:])


def test_periodic_blocks_grow_by_one_in_a_period():
    model = tiny_model()
    cache = PagedCache(model.config, policy=SinkRecentPeriodic(4, 32, 64))
    stream(model, cache, 700)
    # Of 719 columns: the newest, and one block for each 64 tokens before them.
    assert cache.stats().used_blocks <= 719 // 64 + 1 + 32 // 16 + 2
    cache.check_integrity()


def test_reset_begins_a_new_text():
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    first = stream(model, cache, 200)
    cache.reset()
    assert (cache.stats().used_blocks, cache.stats().evicted, cache.get_seq_length()) == (0, 0, 0)
    assert stream(model, cache, 200) == first
    cache.free()
    assert cache.stats().reserved_bytes == 0
    assert stream(model, cache, 200) == first


def test_rows_leave_and_repeat():
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    with torch.inference_mode():
        x = prompt(90, 90, 90)["input_ids"]
        for _ in range(30):
            x = model(input_ids=x, **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        x = x[[2, 2, 0, 0]]
        out = []
        for _ in range(60):
            x = model(input_ids=x, **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)
            out.append(x)
            cache.check_integrity()
    rows = torch.cat(out, dim=1)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])


def test_a_forward_that_breaks_off_drops_nothing_that_is_still_wanted(monkeypatch):
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    want = stream(model, PagedCache(model.config, policy=POLICY), 300)
    last, got, x = model.model.layers[-1], [], prompt(20)["input_ids"]
    with torch.inference_mode():
        for step in range(300):
            if step % 7 == 3:
                with monkeypatch.context() as patch:
                    patch.setattr(last, "forward", _fail)
                    with pytest.raises(RuntimeError, match="no power"):
                        model(input_ids=x, **{CACHE_KEYWORD: cache})
                with pytest.raises(RuntimeError, match="stopped half way"):
                    model(input_ids=x, **{CACHE_KEYWORD: cache})
            x = model(input_ids=x, **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)
            got.append(int(x))
    assert got == want
    cache.check_integrity()


def _fail(*args, **kwargs):
    raise RuntimeError("no power")
