"""A prompt is computed once: explicit caches of a store give the tokens of fresh ones, for less work."""

import copy
import gc
import itertools

import pytest
import torch
import transformers

from hf_kvopt import (
    CacheStateError,
    OutOfBlocks,
    PagedCache,
    PrefixStore,
    UnsupportedModel,
    enable,
    prefix_store,
)
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.prefix.identity import ModelIdentity
from tests.helpers import KINDS, NEW_TOKENS, generate, tiny_config, tiny_model
from tests.prefix.prefixes import batch, counted, eager, shared_model, text, turn

SYSTEM = text(70, seed=7)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 15, 16, 17, 33, 48])
def test_a_prompt_that_is_known_whole_leaves_one_token_to_compute(kind: str, length: int) -> None:
    model, inputs = tiny_model(kind), batch(text(length))
    store = PrefixStore(model)
    for known in (0, length - 1 if length > 2 else 0, length - 1 if length > 2 else 0):
        with counted() as forwards:
            assert torch.equal(turn(store, model, inputs), eager(kind, inputs))
        assert forwards[0] == length - known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [3, 16, 21, 40])
def test_texts_that_part_inside_a_block_share_up_to_there(kind: str, shared: int) -> None:
    model, store = shared_model(kind)
    turn(store, model, batch(text(50)))
    other = batch(text(50)[:shared] + text(30, seed=1))
    cache = store.cache(**other)
    assert shared <= cache.num_shared <= shared + 1  # one more token may agree by chance
    del cache
    assert torch.equal(turn(store, model, other), eager(kind, other))
    # The first text is untouched by what was written behind the shared part of its block.
    assert torch.equal(turn(store, model, batch(text(50))), eager(kind, batch(text(50))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["hf_kvopt", "sdpa", "eager"])
def test_rows_of_unlike_matches_and_padding_give_the_tokens_of_fresh_caches(kind: str, attention: str) -> None:
    model = tiny_model(kind, attention)
    store = PrefixStore(model)
    known, half, new = SYSTEM + text(9, seed=1), SYSTEM[:37] + text(20, seed=2), text(25, seed=3)
    turn(store, model, batch(known))
    inputs = batch(known + text(4, seed=4), half, new, known[:75], columns=90)
    assert torch.equal(turn(store, model, inputs), eager(kind, inputs))
    with counted() as forwards:
        assert torch.equal(turn(store, model, inputs), eager(kind, inputs))
    assert forwards[0] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_cold_batch_computes_what_its_rows_have_in_common_once(kind: str) -> None:
    model = tiny_model(kind)
    store = PrefixStore(model)
    rows = [SYSTEM + text(n, seed=n) for n in (5, 11, 3, 8)]
    with counted() as forwards:
        assert torch.equal(turn(store, model, batch(*rows)), eager(kind, batch(*rows)))
    prefill = sum(forwards[: -(NEW_TOKENS - 1)])
    assert len(SYSTEM) <= prefill < 2 * len(SYSTEM)


def test_branches_of_branches_are_computed_once_each() -> None:
    model, store = shared_model()
    left, right = SYSTEM + text(40, seed=1), SYSTEM + text(40, seed=2)
    rows = [branch + text(6, seed=seed) for branch in (left, right) for seed in (3, 4)]
    with counted() as forwards:
        output = turn(PrefixStore(model), model, batch(*rows))
    assert torch.equal(output, eager("full", batch(*rows)))
    assert sum(forwards[: -(NEW_TOKENS - 1)]) < len(SYSTEM) + 2 * 40 + 90
    store.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}],
    ids=["beams", "returned beams", "samples"],
)
def test_beams_and_returned_sequences_take_rows_by_themselves(kind: str, options: dict[str, object]) -> None:
    model, inputs = tiny_model(kind), batch(SYSTEM[:40], SYSTEM[:30])
    store = PrefixStore(model)
    turn(store, model, inputs)
    for _ in range(2):
        torch.manual_seed(0)
        expected = eager(kind, inputs, **options)
        torch.manual_seed(0)
        assert torch.equal(turn(store, model, inputs, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_goes_on_where_it_stopped(kind: str) -> None:
    model, store = shared_model(kind)
    history = SYSTEM
    for seed in range(4):
        history = history + text(9, seed=seed)
        inputs = batch(history)
        cache = store.cache(**inputs)
        # All but what was said last, and the answer's last token, whose keys nobody computed.
        assert cache.num_shared >= (len(history) - 10 if seed else 0)
        output = generate(model, inputs, cache)
        assert torch.equal(output, eager(kind, inputs))
        store.commit(cache, output)
        history = output[0].tolist()


def test_two_branches_of_one_prompt_do_not_see_each_other() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM))
    caches = [store.cache(**batch(SYSTEM)) for _ in range(3)]
    inputs = batch(SYSTEM)
    for seed, cache in enumerate(caches):
        torch.manual_seed(seed)
        output = generate(model, inputs, cache, do_sample=True)
        torch.manual_seed(seed)
        assert torch.equal(output, eager("full", inputs, do_sample=True))
    store.check_integrity()


def test_a_fork_of_a_cache_is_a_branch() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM))
    cache = store.cache(**batch(SYSTEM))
    twin = copy.deepcopy(cache)
    for each in (twin, cache):
        store.commit(each, generate(model, batch(SYSTEM), each))
    store.check_integrity()


@pytest.mark.skipif(transformers.__version__ < "5.21", reason="chunks begin at the first token before 5.21")
def test_chunked_prefill_goes_on_behind_what_is_known() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM[:20]))
    for chunk in (7, 16, 49):
        cache = store.cache(**batch(SYSTEM[:20] + text(49, seed=chunk)))
        inputs = batch(SYSTEM[:20] + text(49, seed=chunk))
        assert torch.equal(generate(model, inputs, cache, prefill_chunk_size=chunk), eager("full", inputs))


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4"])
def test_quantized_blocks_are_shared_and_read_as_in_a_fresh_cache(format: str, block_size: int) -> None:
    model = tiny_model()
    store = PrefixStore(model, format=format, block_size=block_size)
    inputs = batch(SYSTEM + text(5), SYSTEM[:50])
    first, second = turn(store, model, inputs), turn(store, model, inputs)
    fresh = generate(model, inputs, PrefixStore(model, format=format, block_size=block_size).cache(**inputs))
    assert torch.equal(first, second)
    assert torch.equal(first, fresh)
    assert store.stats().hits == 2


def test_least_recently_used_texts_go_when_the_cap_is_reached() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=256)
    for seed in range(8):
        turn(store, model, batch(text(60, seed=seed)))
    assert store.stats().evictions > 0
    assert store.match_length(text(60, seed=7)) == 60
    assert store.match_length(text(60, seed=0)) < 16
    assert store.stats().num_blocks <= 256 // 16


def test_pinned_texts_stay_and_unpinned_ones_go_again() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=256)
    turn(store, model, batch(SYSTEM))
    assert store.pin(SYSTEM) == len(SYSTEM)
    for seed in range(8):
        turn(store, model, batch(text(60, seed=10 + seed)))
    assert store.match_length(SYSTEM) == len(SYSTEM)
    store.unpin(SYSTEM)
    for seed in range(8):
        turn(store, model, batch(text(60, seed=10 + seed)))
    assert store.match_length(SYSTEM) < 16


def test_namespaces_do_not_see_each_other() -> None:
    (model, store), inputs = shared_model(), batch(SYSTEM)
    mine = store.cache(**inputs, namespace="mine")
    store.commit(mine, generate(model, inputs, mine))
    assert store.cache(**inputs, namespace="yours").num_shared == 0
    assert store.cache(**inputs, namespace="mine").num_shared == len(SYSTEM) - 1


def test_weights_that_were_written_to_make_old_texts_unknown() -> None:
    model, inputs = copy.deepcopy(tiny_model()), batch(SYSTEM)
    store = PrefixStore(model)
    turn(store, model, inputs)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert store.cache(**inputs).num_shared == 0
    assert torch.equal(turn(store, model, inputs), generate(model, inputs, PagedCache()))


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_weights_that_are_put_in_the_place_of_others_make_other_keys(how: str) -> None:
    model = copy.deepcopy(tiny_model())
    identity, layer = ModelIdentity(model), model.model.layers[0].mlp.up_proj
    before = identity.state()
    assert identity.state() == before
    if how == "data":
        layer.weight.data = layer.weight.data * 1.1
    else:
        old = layer.weight
        layer.weight = torch.nn.Parameter(torch.empty_like(old))
        torch._C._autograd._unsafe_set_version_counter((layer.weight,), (old._version,))
    assert identity.state() != before


def test_an_adapter_that_is_switched_makes_other_keys() -> None:
    class Adapted(torch.nn.Linear):
        disable_adapters, merged_adapters = False, ()
        active_adapters = ("first",)

    model = copy.deepcopy(tiny_model())
    identity = ModelIdentity(model)
    states = {identity.state()}
    layer = Adapted(4, 4)
    model.model.layers[0].mlp.extra = layer
    states.add(identity.state())
    layer.active_adapters = ["second"]
    states.add(identity.state())
    layer.disable_adapters = True
    states.add(identity.state())
    assert len(states) == 4
    assert identity.state() in states


def test_a_store_without_the_model_shares_what_all_rows_know() -> None:
    model, store = tiny_model(), PrefixStore(tiny_config("full"))
    turn(store, model, batch(SYSTEM))
    inputs = batch(SYSTEM + text(5), SYSTEM[:40] + text(20, seed=2))
    with counted() as forwards:
        assert torch.equal(turn(store, model, inputs), eager("full", inputs))
    assert forwards[0] == 2 * (75 - 55)


def test_statistics_count_rows_tokens_and_bytes() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM))
    turn(store, model, batch(SYSTEM, text(20, seed=5)))
    stats = store.stats()
    assert (stats.rows, stats.hits, stats.prompt_tokens, stats.hit_tokens) == (3, 1, 160, 69)
    gc.collect()
    assert store.stats().used_bytes == stats.num_blocks * stats.reserved_bytes // store.allocators[0].num_blocks


def test_clear_forgets_and_free_gives_the_memory_back() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM))
    store.clear()
    assert store.stats().num_blocks == store.stats().used_bytes == 0
    assert torch.equal(turn(store, model, batch(SYSTEM)), eager("full", batch(SYSTEM)))
    cache = store.cache(**batch(SYSTEM))
    store.free()
    assert store.stats().reserved_bytes == 0
    for use in (lambda: generate(model, batch(SYSTEM), cache), lambda: store.cache(**batch(SYSTEM))):
        with pytest.raises(CacheStateError, match="freed"):
            use()


def committed(store: PrefixStore, model: object) -> object:
    cache = store.cache(**batch(SYSTEM))
    store.commit(cache, generate(model, batch(SYSTEM), cache))
    return cache


def test_what_commit_cannot_take_is_refused_and_the_store_is_intact() -> None:
    model, store = shared_model()
    inputs = batch(SYSTEM)
    cache = store.cache(**inputs)
    output = generate(model, inputs, cache)
    foreign = PrefixStore(model).cache(**inputs)
    for error, what, ids, message in (
        (CacheStateError, foreign, output, "another store"),
        (CacheStateError, PagedCache(), output, "PagedCache"),
        (CacheStateError, store.new_cache(), output, "never filled"),
        (ValueError, cache, output[:, 1:], "other prompts"),
        (ValueError, cache, output + 1, "other prompts"),
        (ValueError, cache, output.repeat(2, 1), "rows"),
        (ValueError, cache, output[:, :-2], "columns"),
    ):
        with pytest.raises(error, match=message):
            store.commit(what, ids)
    assert store.stats().num_blocks == 0
    assert store.commit(cache, output) > 0
    with pytest.raises(CacheStateError, match="committed already"):
        store.commit(cache, output)
    store.check_integrity()


def test_a_cache_is_not_written_to_after_its_commit() -> None:
    model, store = shared_model()
    cache = committed(store, model)
    known = store.stats().num_blocks
    for use in (lambda: generate(model, batch(SYSTEM), cache), lambda: cache.crop(-1)):
        with pytest.raises(CacheStateError, match="was committed"):
            use()
    assert store.stats().num_blocks == known
    assert torch.equal(turn(store, model, batch(SYSTEM)), eager("full", batch(SYSTEM)))


def test_a_cache_of_one_model_is_refused_by_another() -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM))
    with pytest.raises(CacheStateError, match="another model"):
        generate(tiny_model(seed=1), batch(SYSTEM), store.cache(**batch(SYSTEM)))
    assert torch.equal(turn(store, model, batch(SYSTEM)), eager("full", batch(SYSTEM)))


def test_a_store_smaller_than_a_prompt_says_so() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=48)
    with pytest.raises(OutOfBlocks, match="raise max_tokens"):
        turn(store, model, batch(SYSTEM))
    assert torch.equal(turn(store, model, batch(SYSTEM[:20])), eager("full", batch(SYSTEM[:20])))


def test_a_batch_that_does_not_fit_apart_is_still_right() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=16 * 12)
    rows = batch(SYSTEM[:40] + text(6), SYSTEM[:40] + text(9, seed=1), SYSTEM[:44])
    for _ in range(3):
        assert torch.equal(turn(store, model, rows), eager("full", rows))


@pytest.mark.parametrize("known", [2, 20, 35, 69])
def test_feeding_anything_but_what_is_missing_is_refused_before_a_wrong_token(known: int) -> None:
    model, store = shared_model()
    turn(store, model, batch(SYSTEM[:known]))
    inputs = batch(SYSTEM)
    suffix = {"input_ids": inputs["input_ids"][:, known:]}
    with pytest.raises((CacheStateError, IndexError)):
        generate(model, suffix, store.cache(**inputs))
    right = {**suffix, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, right, store.cache(**inputs))[:, -NEW_TOKENS:], eager("full", inputs)[:, 70:])
    with pytest.raises(CacheStateError):
        generate(model, inputs, store.cache(**inputs), assistant_model=tiny_model())
    store.check_integrity()


def test_padding_must_be_said_and_lie_on_the_left() -> None:
    _, store = shared_model()
    inputs = batch(SYSTEM, SYSTEM[:9])
    with pytest.raises(ValueError, match="pad token"):
        store.cache(inputs["input_ids"])
    with pytest.raises(ValueError, match="on the left"):
        store.cache(inputs["input_ids"], inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="shape"):
        store.cache(inputs["input_ids"], inputs["attention_mask"][:, 1:])
    with pytest.raises(ValueError, match="ones and zeros: got other numbers"):
        store.cache(inputs["input_ids"], inputs["attention_mask"] * 2)
    with pytest.raises(ValueError, match="batch"):
        store.cache(inputs["input_ids"][0])


def refused_configs() -> dict[str, object]:
    from transformers import BartConfig, DeepseekV32Config, Mamba2Config

    scaled = tiny_config("full")
    scaled.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    return {
        "encoder-decoder": BartConfig(),
        "indexed_attention": DeepseekV32Config(),
        "without keys": Mamba2Config(),
        "dynamic": scaled,
    }


@pytest.mark.parametrize("word", ["encoder-decoder", "indexed_attention", "without keys", "dynamic"])
def test_models_whose_keys_depend_on_more_than_the_tokens_before_are_refused(word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        PrefixStore(refused_configs()[word])


def test_random_texts_over_a_small_store_never_give_a_wrong_token() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=16 * 20)
    draws = torch.Generator().manual_seed(0)
    trunks = [text(45, seed=n) for n in range(3)]
    for step, _ in enumerate(itertools.repeat(None, 14)):
        picks = torch.randint(0, 1000, (2, 3), generator=draws).tolist()
        rows = [trunks[a % 3][: 5 + b % 41] + text(1 + c % 12, seed=c) for a, b, c in picks]
        inputs = batch(*rows[: 1 + step % 2])
        assert torch.equal(turn(store, model, inputs, max_new_tokens=4), eager("full", inputs, max_new_tokens=4))
    assert store.stats().evictions > 0
    assert store.stats().hits > 0


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_rows_that_share_a_beginning_are_read_in_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = shared_model(kind)
    turn(store, model, batch(SYSTEM + text(20)))
    inputs = batch(SYSTEM + text(9, seed=1), SYSTEM + text(4, seed=2))
    gathered = []
    full = next(table for window, table in store.new_cache()._tables.items() if window is None).allocator

    def note(table: object, *args: object) -> object:
        gathered.append(table.allocator is full)
        return original(table, *args)

    original = BlockTable.gather_slots
    monkeypatch.setattr(BlockTable, "gather_slots", note)
    assert torch.equal(turn(store, model, inputs), eager(kind, inputs))
    assert not any(gathered)


@pytest.mark.parametrize("given", ["a hole in the mask", "a row that is padded further", "other tokens"])
def test_a_cache_takes_no_other_prompt_than_its_own(given: str) -> None:
    model, inputs = tiny_model(), batch(text(40), text(40, seed=2))
    store = PrefixStore(model)
    turn(store, model, inputs)
    other = {name: value.clone() for name, value in inputs.items()}
    if given == "other tokens":
        other["input_ids"][1, 3] += 1
    else:
        other["attention_mask"][1, {"a hole in the mask": slice(5, 6)}.get(given, slice(0, 3))] = 0
    cache = store.cache(**inputs)
    with pytest.raises(CacheStateError, match="filled for other prompts"):
        generate(model, other, cache)
    del cache
    assert torch.equal(turn(store, model, inputs), eager("full", inputs))
    store.check_integrity()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [(18,), (35, 35, 35), (50, 46)], ids=str)
def test_a_store_of_just_one_batch_serves_it_again(lengths: tuple[int, ...], beams: int) -> None:
    size = 16
    blocks = beams * len(lengths) * -(-(max(lengths) + NEW_TOKENS) // size)
    model = enable(tiny_model(), prefix_sharing=True, max_tokens=blocks * size)
    inputs = batch(*(text(length, seed=length + i) for i, length in enumerate(lengths)))
    want = generate(tiny_model("full", "eager"), inputs, num_beams=beams)
    for _ in range(3):
        assert torch.equal(generate(model, inputs, num_beams=beams), want)
    prefix_store(model).check_integrity()
