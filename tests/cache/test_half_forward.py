"""Forwards that break off before all layers have written: said at the next call, and never a wrong token."""

import contextlib

import pytest
import torch

import hf_kvopt
from hf_kvopt import CacheStateError, KVOptError, PagedCache, PrefixStore
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.prefix.index import PrefixIndex
from tests.helpers import eager_tokens, generate, prompt, tiny_config, tiny_model, unpadded

CACHES = {
    "growing": lambda: PagedCache(tiny_config("full")),
    "growing, without a config": lambda: PagedCache(),
    "fixed": lambda: PagedCache(tiny_config("full"), max_tokens=256, compileable=True),
}


def break_off(model, layer_idx):
    """Let the next forward fail in the MLP behind attention `layer_idx`; returns the hook."""

    def fail(*_):
        raise KeyboardInterrupt

    return model.model.layers[layer_idx].mlp.register_forward_hook(fail)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_first_forward_that_broke_off_is_not_continued_by_a_longer_prompt(make_cache):
    model, cache = tiny_model(), make_cache()
    hook = break_off(model, 0)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(20), cache)
    hook.remove()
    with pytest.raises(CacheStateError, match=r"stopped half way.*0 are left.*with the whole text"):
        generate(model, prompt(30), cache)
    assert torch.equal(generate(model, prompt(30), cache), eager_tokens("full", 30))


def test_a_step_of_fixed_capacity_that_broke_off_is_taken_back():
    model, cache = tiny_model(), CACHES["fixed"]()
    tokens = generate(model, prompt(20), cache)
    longer = {"input_ids": torch.cat([tokens, prompt(3)["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    hook = break_off(model, 0)
    with pytest.raises(KeyboardInterrupt):
        generate(model, longer, cache)
    hook.remove()
    with pytest.raises(CacheStateError, match=r"stopped half way.*taken back and 31 are left"):
        generate(model, longer, cache)
    assert torch.equal(generate(model, longer, cache), generate(model, longer))


def test_a_compiled_prefill_of_fixed_capacity_agrees():
    model, cache = tiny_model(), CACHES["fixed"]()
    ids = prompt(20)["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        got = torch.compile(model, backend="eager")(ids, **{hf_kvopt.CACHE_KEYWORD: cache}).logits
    torch._dynamo.reset()
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("lost", [True, False], ids=["taken by nobody", "given back too early"])
def test_reset_counts_blocks_anew_after_an_interrupt_within_the_allocator(lost):
    model, cache = tiny_model(), PagedCache()
    generate(model, prompt(20), cache)
    table = cache.layers[0].table
    if lost:
        table.allocator.allocate(3)
    else:
        table.allocator.release(table.rows[0])
    with pytest.raises(KVOptError, match="accounting is broken"):
        cache.check_integrity()
    cache.reset()
    cache.check_integrity()
    assert cache.stats().used_blocks == 0
    assert torch.equal(generate(model, prompt(20), cache), eager_tokens("full", 20))


def test_clearing_a_store_counts_its_blocks_anew():
    model = tiny_model()
    store = PrefixStore(model)
    inputs = prompt(20)
    cache = store.cache(**inputs)
    store.commit(cache, generate(model, inputs, cache))
    store.allocators[0].allocate(3)
    store.clear()
    store.check_integrity()
    assert store.stats().used_bytes == 0


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_what_breaks_off_while_it_is_written_is_not_held(make_cache, layer_idx, monkeypatch):
    model, cache = tiny_model(), make_cache()
    text = eager_tokens("full", 20)
    with torch.no_grad():
        model(text[:, :19], **{hf_kvopt.CACHE_KEYWORD: cache})
    pool, name = cache.layers[layer_idx].pool, "store" if cache.cache_config.compileable else "write"

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, name, fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, unpadded(text[:, :24]), cache)
    monkeypatch.undo()
    assert int(cache.get_seq_length()) == 19
    cache.check_integrity()
    assert torch.equal(generate(model, unpadded(text[:, :24]), cache, max_new_tokens=8), text)


def break_off_in_call(monkeypatch, owner, name, number):
    """Let the call of that number (from 1) of `owner.name` fail."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("number", range(1, 13))
@pytest.mark.parametrize(
    ("owner", "name"),
    [(KVPool, "write"), (KVPool, "views"), (BlockAllocator, "retain"), (PrefixIndex, "_touch")],
    ids=["write", "views", "retain", "touch"],
)
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_what_broke_off_is_not_shared(kind, owner, name, number, monkeypatch):
    model, text = hf_kvopt.enable(tiny_model(kind), prefix_sharing=True), prompt(40)
    break_off_in_call(monkeypatch, owner, name, number)
    with contextlib.suppress(KeyboardInterrupt):
        generate(model, text)
    monkeypatch.undo()
    generate(model, prompt(40, seed=1))  # into blocks that may be thought to be free
    for _ in range(2):
        assert torch.equal(generate(model, text), eager_tokens(kind, 40))


@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_the_error_of_a_first_prompt_comes_through_a_store(layer_idx):
    model = hf_kvopt.enable(tiny_model("mixed"), prefix_sharing=True)
    hook = break_off(model, layer_idx)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(40))
    hook.remove()
    hf_kvopt.prefix_store(model).check_integrity()
    assert torch.equal(generate(model, prompt(40)), eager_tokens("mixed", 40))
