"""Prefixes over sealed blocks: a text is gone on from where its newest blocks lie as they were computed."""

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, PrefixStore, QuantizedPagedCache
from hf_kvopt.prefix.exact import columns_in_common, lengths_to_go_on_from, read_behind
from hf_kvopt.prefix.node import Node
from tests.cache.sealed import FORMATS
from tests.helpers import generate, tiny_model
from tests.prefix.prefixes import batch, counted, text, turn

by_format = pytest.mark.parametrize("name", FORMATS[:1])  # what is shared does not depend on the format
KINDS = ("full", "mixed")
SYSTEM = text(90, seed=7)


def store_of(model, name, **options):
    return PrefixStore(model, format=name, block_size=16, skip_layers=(), **options)


def cold(model, name, inputs, **options):
    """Tokens from an empty cache."""
    return generate(
        model, inputs, QuantizedPagedCache(model.config, format=name, block_size=16, skip_layers=()), **options
    )


def nodes(*exact):
    """A path of nodes, some of them exact."""
    path = [Node((0,) * 16, [i], None) for i in range(8)]
    for i in exact:
        path[i].is_exact = True
    return path


def test_lengths_to_go_on_from_have_what_their_next_token_reads():
    assert lengths_to_go_on_from([], 0, 16) == {0}
    assert lengths_to_go_on_from(nodes(4, 5), 128, 16) == {0}  # the first block is missing
    assert lengths_to_go_on_from(nodes(0), 128, 16) == set(range(17))
    assert lengths_to_go_on_from(nodes(0, 4, 5), 128, 16) == {*range(17), 80, *range(81, 97)}
    assert lengths_to_go_on_from(nodes(0, 4, 5), 85, 16) == {*range(17), 80, 81, 82, 83, 84, 85}
    for length in range(1, 129):
        needed = {0, *read_behind(length, 16)}
        assert length in lengths_to_go_on_from(nodes(*needed), 128, 16)
        for block in needed:
            assert length not in lengths_to_go_on_from(nodes(*(needed - {block})), 128, 16)


def test_rows_of_a_batch_go_on_from_a_column_that_suits_all():
    assert columns_in_common([0, 3], [{0, 16, 20}, {0, 13, 17}]) == 20
    assert columns_in_common([0, 3], [{0, 16, 21}, {0, 13, 17}]) == 16
    assert columns_in_common([0, 30], [{0, 16, 21}, {0, 5}]) == 21  # before the second row begins
    assert columns_in_common([0, 0], [{0, 5}, {0, 6}]) == 0


@by_format
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 16, 17, 48, 49, 100])
def test_a_prompt_that_is_known_whole_leaves_one_token_to_compute(kind, length, name):
    model, inputs = tiny_model(kind), batch(text(length))
    store = store_of(model, name)
    expected = cold(model, name, inputs)
    for known in (0, length - 1 if length > 2 else 0, length - 1 if length > 2 else 0):
        with counted() as forwards:
            assert torch.equal(turn(store, model, inputs), expected)
        assert forwards[0] == length - known


@by_format
@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_a_talk_go_on_from_the_last(kind, name):
    model, store = tiny_model(kind), None
    store, talk = store_of(model, name), text(50)
    for i in range(4):
        inputs = batch(talk)
        with counted() as forwards:
            output = turn(store, model, inputs)
        assert torch.equal(output, cold(model, name, inputs))
        if i:
            assert forwards[0] == 22  # what was generated last, and the new part
        talk = output[0].tolist() + text(21, seed=i)


@by_format
@pytest.mark.parametrize("shared", [64, 70, 90])
def test_a_place_where_texts_part_is_known_from_the_second_time_on(shared, name):
    model = tiny_model("full")
    store = store_of(model, name)
    forwarded = []
    for seed in range(4):
        inputs = batch(SYSTEM[:shared] + text(30, seed=seed + 1))
        with counted() as forwards:
            assert torch.equal(turn(store, model, inputs), cold(model, name, inputs))
        forwarded.append(forwards[0])
    assert forwarded[0] == shared + 30
    assert forwarded[2] <= 30
    assert forwarded[3] <= 30


@by_format
@pytest.mark.parametrize("kind", KINDS)
def test_logits_behind_a_hit_are_those_of_a_cold_run(kind, name):
    model = tiny_model(kind)
    store, whole = store_of(model, name), text(120)
    turn(store, model, batch(whole[:100]))
    inputs = batch(whole)
    hit = store.cache(**inputs)
    assert hit.num_shared == 100
    fresh = QuantizedPagedCache(model.config, format=name, block_size=16, skip_layers=())
    with torch.no_grad():
        ids = inputs["input_ids"]
        model(ids[:, :100], **{CACHE_KEYWORD: fresh})
        # The same rest over bytes that are the same: the very same numbers.
        assert torch.equal(*(model(ids[:, 100:], **{CACHE_KEYWORD: one}).logits for one in (hit, fresh)))


@by_format
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unlike_matches_and_padding_get_the_tokens_of_fresh_caches(kind, name):
    model = tiny_model(kind)
    store = store_of(model, name)
    known, half, new = SYSTEM + text(9, seed=1), SYSTEM[:67] + text(40, seed=2), text(25, seed=3)
    turn(store, model, batch(known))
    inputs = batch(known + text(4, seed=4), half, new, known[:85], columns=110)
    expected = cold(model, name, inputs)
    for _ in range(3):
        assert torch.equal(turn(store, model, inputs), expected)
    with counted() as forwards:
        assert torch.equal(turn(store, model, inputs), expected)
    assert forwards[0] == 4


@by_format
def test_what_rows_of_a_batch_have_in_common_is_computed_once(name):
    model = tiny_model("full")
    store = store_of(model, name)
    inputs = batch(*(SYSTEM[:80] + text(20, seed=i) for i in range(4)))
    with counted() as forwards:
        assert torch.equal(turn(store, model, inputs), cold(model, name, inputs))
    assert sum(forwards[:3]) <= 100 + 3 * 21 + 4


@by_format
def test_random_texts_give_the_tokens_of_fresh_caches_and_lose_no_block(name):
    model = tiny_model("full")
    store, made = store_of(model, name, max_tokens=1600), torch.Generator().manual_seed(1)
    texts = [text(60, seed=3)]
    for i in range(12):
        base = texts[int(torch.randint(0, len(texts), (1,), generator=made))]
        cut = int(torch.randint(1, len(base), (1,), generator=made))
        inputs = batch(base[:cut] + text(int(torch.randint(2, 40, (1,), generator=made)), seed=i))
        output = turn(store, model, inputs, max_new_tokens=10)
        assert torch.equal(output, cold(model, name, inputs, max_new_tokens=10))
        texts.append(output[0].tolist())
        tails = store.allocators[0].tails
        # Beside first blocks and branches, a text keeps what its end and its prompt's end need.
        assert len(tails.places) <= 6 * len(texts)


@by_format
def test_a_cache_cut_into_sealed_blocks_is_not_filed(name):
    model = tiny_model("full")
    store, inputs = store_of(model, name), batch(text(150))
    cache = store.cache(**inputs)
    with torch.no_grad():
        model(inputs["input_ids"][:, :150], **{CACHE_KEYWORD: cache})
        cache.crop(-70)
        model(inputs["input_ids"][:, 80:150], **{CACHE_KEYWORD: cache})
    store.commit(cache, inputs["input_ids"])
    assert store.match_length(inputs["input_ids"]) == 0
    store.check_integrity()


@by_format
def test_evicted_texts_leave_no_exact_block(name):
    model = tiny_model("full")
    store = store_of(model, name)
    for seed in range(3):
        turn(store, model, batch(text(70, seed=seed)))
    store.clear()
    turn(store, model, batch(text(40, seed=9)))
    tails = store.allocators[0].tails
    held = {block for node in store.index.nodes() for block in node.blocks}
    assert set(tails.places) <= held
    assert next(store.index.nodes()).is_exact


@by_format
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_store_is_gone_on_from(kind, name, tmp_path):
    model = tiny_model(kind)
    store, talk = store_of(model, name), batch(text(100))
    turn(store, model, talk)
    store.save(tmp_path / "store.safetensors")
    loaded = PrefixStore.load(tmp_path / "store.safetensors", model)
    longer = batch(text(100) + text(30, seed=3))
    assert loaded.match_length(longer["input_ids"]) == store.match_length(longer["input_ids"]) == 100
    outputs = [turn(one, model, longer) for one in (loaded, store)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], cold(model, name, longer))
