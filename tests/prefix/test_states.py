"""Prefix sharing where layers hold states: a hit gives what a cold call gives, bit for bit.

Prompts are read by the store up to where states are kept, so a prompt that comes again is read in the same parts.
"""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_kvopt import (
    CACHE_KEYWORD,
    CacheStateError,
    PagedCache,
    PrefixStore,
    UnsupportedModel,
    enable,
    prefix_store,
    speculative,
)
from hf_kvopt.cache.states import StateLayer, num_bytes
from hf_kvopt.prefix.cache import PrefixSharedCache
from tests.models.cases import Case
from tests.models.tiny import build
from tests.prefix.prefixes import batch, text
from tests.speculation.drafters import Oracle

pytestmark = pytest.mark.usefixtures("one_thread")
# A gated delta rule, Mamba 2 beside keys in one layer, convolutions alone, a value of the token before.
NAMES = ["qwen3_next", "falcon_h1", "lfm2", "zaya"]
each_kind = pytest.mark.parametrize("name", NAMES)
SYSTEM = text(100, seed=7)
NEW = 12


def built(name: str = "lfm2") -> PreTrainedModel:
    return build(Case(name, "text"))


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


def plain(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Tokens from a fresh cache of transformers."""
    cache = DynamicCache(config=model.config)
    tokens: Tensor = generate(model, inputs, **{CACHE_KEYWORD: cache}, **options)
    return tokens


def turn(store: PrefixStore, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    cache = store.cache(**inputs)
    tokens: Tensor = generate(store.model, inputs, **{CACHE_KEYWORD: cache}, **options)
    store.commit(cache, tokens)
    store.check_integrity()
    return tokens


def logits(model: PreTrainedModel, store: PrefixStore, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Logits of all new tokens, and how many columns were known."""
    cache = store.cache(**inputs)
    known = cache.num_shared
    output = generate(store.model, inputs, **{CACHE_KEYWORD: cache}, output_logits=True, return_dict_in_generate=True)
    store.commit(cache, output.sequences)
    return torch.stack(output.logits), known


def unlike() -> dict[str, Tensor]:
    return batch(SYSTEM + text(9, seed=4), SYSTEM[:70] + text(30, seed=8), text(5, seed=9), [7], SYSTEM, columns=120)


@each_kind
@pytest.mark.parametrize("rows", [1, 5])
def test_a_hit_gives_the_logits_of_a_cold_call_bit_for_bit(name: str, rows: int) -> None:
    model = built(name)
    store = PrefixStore(model)
    inputs = batch(SYSTEM) if rows == 1 else unlike()
    cold, _ = logits(model, store, inputs)
    assert store.stats().hits == 0
    hit, known = logits(model, store, inputs)
    assert torch.equal(hit, cold)
    assert known == (80 if rows == 1 else 119)
    assert store.stats().hits == (1 if rows == 1 else 3)
    assert store.stats().hit_tokens > store.stats().prompt_tokens // 3


@each_kind
def test_prompts_that_begin_alike_are_gone_on_from_where_they_part(name: str) -> None:
    model = built(name)
    store = PrefixStore(model)
    prompts = [batch(SYSTEM + text(40 + n, seed=n)) for n in range(3)]
    hits = []
    for inputs in prompts:
        hits.append(store.stats().hit_tokens)
        assert torch.equal(turn(store, inputs), plain(model, inputs))
    # The second one shows where they part; the third one finds the states that were kept there.
    assert hits[:2] == [0, 0]
    assert store.stats().hit_tokens == len(SYSTEM) // 16 * 16


@each_kind
def test_a_cold_batch_reads_what_its_rows_have_in_common_once(name: str) -> None:
    model = built(name)
    store, lengths = PrefixStore(model), []
    original = PrefixSharedCache.update

    def note(cache: Any, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(len(keys) * keys.shape[2])
        return original(cache, keys, *args, **kwargs)

    inputs = batch(*(SYSTEM + text(n, seed=n) for n in (60, 75, 50, 90)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixSharedCache, "update", note)
        cache = store.cache(**inputs)
    layers = sum(store.blocks.pools[i] is not None for i in store.blocks.pools)
    # Each row's own part, and what all begin with once.
    assert sum(lengths) // layers <= 96 + sum(4 + n for n in (60, 75, 50, 90))
    assert torch.equal(generate(model, inputs, **{CACHE_KEYWORD: cache}), plain(model, inputs))


@each_kind
def test_a_second_turn_goes_on_behind_the_answer(name: str) -> None:
    model = built(name)
    store = PrefixStore(model)
    first = turn(store, batch(SYSTEM))
    second = batch(first[0].tolist() + text(20, seed=2))
    assert store.match_length(second["input_ids"][:, :-1]) == first.shape[1] - 1
    assert torch.equal(turn(store, second), plain(model, second))
    # The answer is gone on from again, though a longer text has taken the place of its last block.
    again = batch(first[0, :-1].tolist() + text(20, seed=5))
    assert store.match_length(again["input_ids"]) == first.shape[1] - 1
    assert torch.equal(turn(store, again), plain(model, again))
    # Written otherwise from the answer on: the states at the last whole block of the prompt serve.
    other = batch(SYSTEM[:-2] + text(20, seed=3))
    assert store.match_length(other["input_ids"]) == 80
    assert torch.equal(turn(store, other), plain(model, other))


@each_kind
def test_each_row_keeps_its_own_states(name: str) -> None:
    model = built(name)
    store = PrefixStore(model)
    rows = [text(60, seed=1), text(60, seed=2), text(49, seed=3), text(7, seed=4)]
    output = turn(store, batch(*rows))
    texts = [answer[60 - len(row) : -1] for row, answer in zip(rows, output.tolist(), strict=True)]
    ends = [(one, len(one)) for one in texts] + [(row, 48) for row in rows[:2]] + [(rows[2], 32)]
    for one, length in ends:
        spelled = store.index.spell(store.key_of(None), one)
        ours = store.index.states_at(spelled, one, length)
        assert ours is not None
        fresh = PrefixSharedCache(store.blocks)
        with torch.no_grad():
            model(torch.tensor([one[:length]]), **{CACHE_KEYWORD: fresh})
        for a, b in zip(parts(ours), parts(fresh.states_of(0)), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    second = batch(*([*one, 5, 6, 7] for one in texts))
    assert store.cache(**second).num_shared > second["input_ids"].shape[1] - 5
    assert torch.equal(turn(store, second), plain(model, second))


@each_kind
def test_texts_and_answers_of_many_lengths_give_plain_tokens(name: str) -> None:
    model = built(name)
    store = PrefixStore(model, max_tokens=640)
    draws = torch.Generator().manual_seed(0)
    trunks = [text(90, seed=n) for n in range(3)]
    for step in range(14):
        picks = torch.randint(0, 1000, (3, 3), generator=draws).tolist()
        rows = [trunks[a % 3][: 5 + b % 86] + text(1 + c % 12, seed=c) for a, b, c in picks]
        inputs = batch(*rows[: 1 + step % 3])
        assert torch.equal(turn(store, inputs, max_new_tokens=4), plain(model, inputs, max_new_tokens=4))
    stats = store.stats()
    assert stats.evictions > 0
    assert stats.hits > 0
    nodes = [node for node in store.index.nodes() if node.states]
    assert stats.checkpoints == sum(len(node.states) for node in nodes)
    assert stats.state_bytes == sum(num_bytes(row) for node in nodes for row in node.states.values())


@each_kind
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_and_returned_sequences_get_states_of_their_own(name: str, options: dict[str, int]) -> None:
    model = built(name)
    store, inputs = PrefixStore(model), batch(SYSTEM, text(60, seed=1))
    for _ in range(2):
        assert torch.equal(turn(store, inputs, **options), plain(model, inputs, **options))
    assert torch.equal(turn(store, inputs), plain(model, inputs))


@each_kind
def test_a_copy_of_a_filled_cache_has_states_of_its_own(name: str) -> None:
    model = built(name)
    store, inputs = PrefixStore(model), batch(SYSTEM)
    cache = store.cache(**inputs)
    twin = copy.deepcopy(cache)
    wanted = plain(model, inputs)
    assert torch.equal(generate(model, inputs, **{CACHE_KEYWORD: cache}), wanted)
    assert torch.equal(generate(model, inputs, **{CACHE_KEYWORD: twin}), wanted)
    store.commit(cache, wanted)
    store.commit(twin, wanted)
    assert torch.equal(turn(store, inputs), wanted)


def test_texts_of_one_namespace_are_not_found_from_another() -> None:
    model, inputs = built(), batch(SYSTEM)
    store = PrefixStore(model)
    cache = store.cache(**inputs, namespace="a")
    store.commit(cache, generate(model, inputs, **{CACHE_KEYWORD: cache}))
    assert store.match_length(inputs["input_ids"], namespace="a") == 80
    assert store.match_length(inputs["input_ids"], namespace="b") == 0
    assert store.match_length(inputs["input_ids"]) == 0


def test_states_of_other_weights_are_not_found() -> None:
    model = built()
    store, inputs = PrefixStore(model), batch(SYSTEM)
    before = turn(store, inputs)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert store.match_length(inputs["input_ids"]) == 0
    after = turn(store, inputs)
    assert torch.equal(after, plain(model, inputs))
    assert not torch.equal(after, before)


def test_states_keep_to_their_bytes_and_pinned_ones_stay() -> None:
    model = built()
    size = num_bytes(PrefixStore(model).cache(**batch(SYSTEM)).states_of(0))
    store = PrefixStore(model, state_limit=3 * size)
    turn(store, batch(SYSTEM))
    assert store.pin(SYSTEM) == 80
    for seed in range(4):
        inputs = batch(text(50, seed=seed))
        assert torch.equal(turn(store, inputs), plain(model, inputs))
        assert store.stats().state_bytes <= 3 * size
        assert store.match_length(SYSTEM) == 80
    assert store.match_length(text(50, seed=0)) == 0
    store.unpin(SYSTEM)
    turn(store, batch(text(50, seed=9)))
    turn(store, batch(text(50, seed=10)))
    assert store.match_length(SYSTEM) == 0


def test_a_limit_below_one_text_finds_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = built()
    store = PrefixStore(model, state_limit=10)
    for inputs in (batch(SYSTEM), batch(SYSTEM), unlike()):
        assert torch.equal(turn(store, inputs), plain(model, inputs))
    assert store.stats().hits == store.stats().state_bytes == 0
    assert "larger state_limit" in caplog.text


def test_a_cleared_or_freed_store_holds_no_states() -> None:
    model = built()
    store = PrefixStore(model)
    turn(store, batch(SYSTEM))
    assert store.stats().state_bytes > 0
    store.clear()
    assert store.stats().checkpoints == store.stats().state_bytes == 0
    assert store.match_length(SYSTEM) == 0


@each_kind
def test_states_come_back_with_a_file(name: str, tmp_path: Path) -> None:
    model = built(name)
    store = PrefixStore(model)
    turns = [batch(SYSTEM), batch(SYSTEM[:40] + text(30, seed=1))]
    wanted = [logits(model, store, inputs)[0] for inputs in turns]
    store.save(tmp_path / "store.safetensors")
    loaded = PrefixStore.load(tmp_path / "store.safetensors", model)
    loaded.check_integrity()
    assert loaded.stats()[-2:] == store.stats()[-2:]
    for inputs, expected in zip(turns, wanted, strict=True):
        found, known = logits(model, loaded, inputs)
        assert known > 0
        assert torch.equal(found, expected)


def test_what_holds_no_states_is_refused() -> None:
    model = built()
    with pytest.raises(UnsupportedModel, match="make the store from the model"):
        PrefixStore(model.config)
    with pytest.raises(UnsupportedModel, match="tiers hold blocks of keys and values, and no states"):
        PrefixStore(model, host_tier="1MiB")
    with pytest.raises(UnsupportedModel, match="JambaMambaMixer, which forgets its states"):
        enable(built("jamba"), prefix_sharing=True)


@each_kind
def test_the_probe_leaves_a_model_as_it_was(name: str) -> None:
    model = built(name).train()
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    PrefixStore(model)
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each_kind
def test_another_prompt_than_a_cache_was_filled_for_is_refused_before_states_move(name: str) -> None:
    model = built(name)
    store, inputs = PrefixStore(model), batch(SYSTEM)
    cache = store.cache(**inputs)
    before = cache.states_of(0)
    with pytest.raises(CacheStateError, match="filled for other prompts"):
        generate(model, batch(text(100, seed=1)), **{CACHE_KEYWORD: cache})
    for ours, were in zip(cache.states_of(0), before, strict=True):
        assert all(a.conv is None or torch.equal(a.conv, b.conv) for a, b in zip(ours, were, strict=True))
    assert torch.equal(generate(model, inputs, **{CACHE_KEYWORD: cache}), plain(model, inputs))


class Stop(LogitsProcessor):
    """Breaks a call off behind some tokens."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return scores


@each_kind
@pytest.mark.parametrize("after", [0, 3])
def test_a_call_that_breaks_off_keeps_no_state_of_other_text(name: str, after: int) -> None:
    model = enable(built(name), prefix_sharing=True)
    inputs = batch(SYSTEM)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, logits_processor=LogitsProcessorList([Stop(after)]))
    assert all(length == 80 for length in kept(prefix_store(model)))
    wanted = plain(built(name), inputs)
    assert torch.equal(generate(model, inputs), wanted)
    assert torch.equal(generate(model, inputs), wanted)


@each_kind
def test_a_forward_that_breaks_off_in_a_layer_keeps_no_state_of_it(name: str) -> None:
    model = built(name)
    store, inputs = PrefixStore(model), batch(SYSTEM)
    cache = store.cache(**inputs)
    store.index.clear()  # as if these states had been let go of: nothing is there to keep the wrong ones out

    def broke(*_: Any, **__: Any) -> None:
        raise RuntimeError("broke")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedCache, "update", broke)
        with pytest.raises(RuntimeError, match="broke"):
            generate(model, inputs, **{CACHE_KEYWORD: cache})
    store.keep(cache, None, close=True)
    assert kept(store) == []


def kept(store: PrefixStore) -> list[int]:
    """Lengths of all texts whose states are kept."""
    found = []
    for node in store.index.nodes():
        before, parent = 0, node.parent
        while parent is not None:
            before, parent = before + len(parent.tokens), parent.parent
        found += [before + count for count in node.states]
    return sorted(found)


def test_a_row_that_ends_early_keeps_no_state_of_what_came_behind() -> None:
    model, rows = built("qwen3_next"), [SYSTEM, text(60, seed=1)]
    whole = plain(model, batch(*rows))
    end = next(int(t) for t in whole[0, 104:] if t not in whole[1] and t not in whole[0, :104])
    model.generation_config.eos_token_id = end
    store = PrefixStore(model)
    output = turn(store, batch(*rows))
    assert output[0, -1] == model.generation_config.pad_token_id or len(set(output[0].tolist())) > 1
    ended = int((output[0] == end).nonzero()[0])
    assert store.match_length(output[0, : ended + 1]) == 80  # of the prompt alone
    assert store.match_length(output[1, 40:]) == 60 + NEW - 1
    for row, start in ((output[0, : ended + 1], 0), (output[1], 40)):
        inputs = batch(row[start:].tolist() + text(9, seed=2))
        assert torch.equal(turn(store, inputs), plain(model, inputs))


@each_kind
def test_plain_generate_of_an_enabled_model_shares(name: str) -> None:
    model, reference = enable(built(name), prefix_sharing=True), built(name)
    for inputs in (batch(SYSTEM), unlike(), batch(SYSTEM + text(50, seed=2)), unlike()):
        assert torch.equal(generate(model, inputs), plain(reference, inputs))
    sampled = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    wanted = generate(reference, batch(SYSTEM), **sampled)
    torch.manual_seed(0)
    assert torch.equal(generate(model, batch(SYSTEM), **sampled), wanted)
    assert prefix_store(model).stats().hits >= 4


@each_kind
@pytest.mark.parametrize("rows", [1, 5])
def test_drafts_and_shared_prefixes_give_plain_tokens_turn_after_turn(name: str, rows: int) -> None:
    reference, inputs = built(name), batch(SYSTEM) if rows == 1 else unlike()
    wanted = plain(reference, inputs)
    spoiled = wanted.clone()
    spoiled[:, -8::3] = (spoiled[:, -8::3] + 1) % 50
    model = enable(built(name), prefix_sharing=True, draft=speculative(Oracle(spoiled), gamma=4, fallback=False))
    for _ in range(2):
        assert torch.equal(generate(model, inputs), wanted)
    assert prefix_store(model).stats().hits > 0
    second = batch(*(row[pad:] for row, pad in rows_of(wanted, inputs)))
    assert torch.equal(generate(model, second), plain(reference, second))


def test_an_assistant_of_transformers_own_leaves_the_states_of_what_was_kept() -> None:
    reference, assistant, inputs = built("lfm2"), built("llama"), batch(SYSTEM)
    model = enable(built("lfm2"), prefix_sharing=True)
    wanted = plain(reference, inputs)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, assistant_model=assistant), wanted)
    second = batch(wanted[0].tolist() + text(20, seed=2))
    for given in (inputs, second):
        assert torch.equal(generate(model, given), plain(reference, given))


@each_kind
def test_a_prefill_in_chunks_goes_on_behind_what_is_known(name: str) -> None:
    model, reference = enable(built(name), prefix_sharing=True), built(name)
    for inputs in (batch(SYSTEM), batch(SYSTEM), unlike()):
        for chunk in (7, 16):
            assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), plain(reference, inputs))


def rows_of(tokens: Tensor, inputs: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    return [(row + text(7, seed=i), pad) for i, (row, pad) in enumerate(zip(tokens.tolist(), pads, strict=True))]


@pytest.mark.parametrize("format", ["int8", "int4", "int4/int4"])
def test_states_go_with_every_storage_format(format: str) -> None:
    model = built("qwen3_next")
    options = {"format": format, "block_size": 16, "skip_layers": ()}
    store = PrefixStore(model, **options)
    for seed in range(3):
        inputs = batch(SYSTEM + text(40, seed=seed))
        first, _ = logits(model, store, inputs)
        again, known = logits(model, store, inputs)
        assert known == 128
        assert torch.equal(again, first)
    assert store.stats().hits == 4  # and the third prompt is gone on from where the first two part


def test_threads_share_states() -> None:
    model = built()
    store = PrefixStore(model, max_tokens=1024)
    prompts = [batch(SYSTEM + text(40 + n, seed=n), text(30, seed=n)) for n in range(4)]
    wanted = [plain(model, inputs) for inputs in prompts]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in (*range(first, 4), *range(first)):
            cache = store.cache(**prompts[i])
            tokens = generate(model, prompts[i], **{CACHE_KEYWORD: cache})
            store.commit(cache, tokens)
            if not torch.equal(tokens, wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    store.check_integrity()
    assert store.stats().hits > 0


def test_a_committed_cache_keeps_no_states_of_the_store() -> None:
    model, inputs = built(), batch(SYSTEM)
    store = PrefixStore(model)
    cache = store.cache(**inputs)
    held = [layer for layer in cache._stock_layers() if isinstance(layer, StateLayer)]
    assert held
    tokens = generate(model, inputs, **{CACHE_KEYWORD: cache})
    store.commit(cache, tokens)
    kept_states = [part.clone() for node in store.index.nodes() for row in node.states.values() for part in parts(row)]
    with pytest.raises(CacheStateError, match="committed"):
        generate(model, inputs, **{CACHE_KEYWORD: cache})
    now = [part for node in store.index.nodes() for row in node.states.values() for part in parts(row)]
    assert all(torch.equal(a, b) for a, b in zip(now, kept_states, strict=True))


def parts(row: Any) -> list[Tensor]:
    states = [state for states in row for state in states]
    return [part for state in states for part in (state.conv, state.recurrent) if part is not None]
