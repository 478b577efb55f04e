"""Calls that break off anywhere, over caches that the caller passed in: the cache goes back to what it held.

The call is then made again over the same cache, and gives the tokens of plain decoding from an empty one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_kvopt import PagedCache, PrefixStore, QuantizedPagedCache, speculative
from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read
from tests.helpers import eager_tokens, generate, prompt, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
NEW, TURN = 10, 4


class Stopped(BaseException):
    """Neither an Exception nor an interrupt that somebody else may raise."""


class Counter:
    """Breaks off at the call of that number, from 1."""

    def __init__(self, at: int, kind: type[BaseException] = Stopped) -> None:
        self.at, self.kind, self.num_calls = at, kind, 0

    def __call__(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise self.kind("broken off on purpose")


class Right(Drafter, DraftSession):
    """Drafts what the target will write, less every fourth token of each row, so that rows keep unlike numbers."""

    def __init__(self, wanted: Tensor, on_extend: Callable[[], None], on_propose: Callable[[], None]) -> None:
        self.wanted, self.on_extend, self.on_propose = wanted, on_extend, on_propose

    def begin(self, target: Any, batch_size: int) -> "Right":
        self.rows, self.ends = list(range(batch_size)), [0] * batch_size
        self.is_first = True
        return self

    def extend(self, read: Read) -> None:
        self.on_extend()
        for i, count in enumerate(read.counts):
            kept = self.ends[i] + count
            self.ends[i] = self.wanted.shape[1] - NEW if self.is_first else kept
        self.is_first = False

    def propose(self, plan: Plan, sample: Any) -> Draft:
        self.on_propose()
        drafted = []
        for row, end in zip(self.rows, self.ends, strict=True):
            tokens = self.wanted[row, end + 1 : end + 1 + plan.gamma].tolist()
            tokens += [3] * (plan.gamma - len(tokens))
            drafted.append([3 if (end + i + 2 * row) % 4 == 0 else token for i, token in enumerate(tokens)])
        return Draft(torch.tensor(drafted))

    def select(self, rows: Any) -> None:
        self.rows, self.ends = [self.rows[i] for i in rows], [self.ends[i] for i in rows]


class Processor(LogitsProcessor):
    def __init__(self, count: Callable[[], None]) -> None:
        self.count = count

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.count()
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, count: Callable[[], None]) -> None:
        self.count = count

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        self.count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(BaseStreamer):
    def __init__(self, count: Callable[[], None]) -> None:
        self.count = count

    def put(self, value: Tensor) -> None:
        self.count()

    def end(self) -> None:
        self.count()


CACHES: dict[str, Callable[[str, int], PagedCache]] = {
    "growing": lambda kind, rows: PagedCache(tiny_config(kind)),
    "without a config": lambda kind, rows: PagedCache(),
    "capped": lambda kind, rows: PagedCache(tiny_config(kind), max_tokens=rows * 64),
    "fixed": lambda kind, rows: PagedCache(tiny_config(kind), max_tokens=rows * 64, compileable=True),
}
PLACES = ("extend", "propose", "processor", "criterion", "streamer", "forward")


def interrupted(model: Any, inputs: dict[str, Tensor], wanted: Tensor, cache: Any, place: str, count: Counter) -> None:
    """Speculate over `cache` and break off at a call of `place`."""

    def nothing() -> None:
        pass

    at = {name: count if name == place else nothing for name in PLACES}
    spec = speculative(
        Right(wanted, at["extend"], at["propose"]), gamma=3, fallback=False,
        streamer=Streamer(count) if place == "streamer" else None,
    )  # fmt: skip
    options: dict[str, Any] = {}
    if place == "processor":
        options["logits_processor"] = LogitsProcessorList([Processor(count)])
    if place == "criterion":
        options["stopping_criteria"] = StoppingCriteriaList([Criterion(count)])
    mlp, hooks = model.model.layers[-1].mlp, []
    if place == "forward":  # a hook makes it another model for a store
        hooks.append(mlp.register_forward_hook(lambda *_: count()))
    try:
        generate(model, inputs, cache, custom_generate=spec, max_new_tokens=NEW, disable_compile=True, **options)
    finally:
        for hook in hooks:
            hook.remove()


def turn_of(kind: str, lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """A second turn behind what was generated for `prompt(*lengths)`, and what plain decoding gives for it."""
    first = eager_tokens(kind, *lengths)
    more = torch.randint(3, 90, (len(lengths), TURN), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([first, more], dim=1)
    mask = torch.nn.functional.pad(prompt(*lengths)["attention_mask"], (0, ids.shape[1] - max(lengths)), value=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs, generate(tiny_model(kind, "eager"), inputs, max_new_tokens=NEW)


def breaks(model: Any, inputs: Any, wanted: Tensor, make: Callable[[], Any], place: str) -> list[int]:
    """Numbers of the calls of `place` at which to break off: the first, the last and one between."""
    count = Counter(-1)
    interrupted(model, inputs, wanted, make(), place, count)
    assert count.num_calls
    return sorted({1, 1 + count.num_calls // 2, count.num_calls})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_a_filled_cache_goes_back_to_what_it_held(
    kind: str, make: Callable[[str, int], PagedCache], place: str
) -> None:
    lengths = (17,) if place == "streamer" else (17, 9, 12)
    model, (inputs, wanted) = tiny_model(kind), turn_of(kind, lengths)

    def filled() -> PagedCache:
        cache = make(kind, len(lengths))
        if kind == "full" or cache.layer_class_to_replicate is None:
            generate(model, prompt(*lengths), cache, disable_compile=True)
        return cache

    for number in breaks(model, inputs, wanted, filled, place):
        cache = filled()
        held = int(cache.get_seq_length())
        with pytest.raises(Stopped):
            interrupted(model, inputs, wanted, cache, place, Counter(number))
        assert int(cache.get_seq_length()) in (held, 0)
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=NEW, disable_compile=True), wanted), number
        cache.check_integrity()
        cache.reset()
        assert not cache.stats().used_blocks or cache.cache_config.compileable


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, ValueError, SystemExit, GeneratorExit])
def test_any_exception_is_taken_alike(kind_of_error: type[BaseException]) -> None:
    model, (inputs, wanted) = tiny_model(), turn_of("full", (17, 9))
    cache = PagedCache(tiny_config("full"))
    generate(model, prompt(17, 9), cache)
    with pytest.raises(kind_of_error):
        interrupted(model, inputs, wanted, cache, "propose", Counter(2, kind_of_error))
    assert torch.equal(generate(model, inputs, cache, max_new_tokens=NEW), wanted)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("name", ["int8", "int4/int4", "int4"])
def test_quantized_rows_young_and_old_are_as_before(name: str, length: int, place: str) -> None:
    model, lengths = tiny_model(), (length,)

    def make(fixed: bool) -> QuantizedPagedCache:
        limits: dict[str, Any] = {"max_tokens": 128, "compileable": True} if fixed else {}
        cache = QuantizedPagedCache(tiny_config("full"), format=name, block_size=16, **limits)
        generate(model, prompt(*lengths), cache, max_new_tokens=3, disable_compile=True)
        return cache

    text = generate(model, prompt(*lengths), QuantizedPagedCache(tiny_config("full"), format=name), max_new_tokens=3)
    inputs = {"input_ids": torch.cat([text, text[:, :TURN]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for fixed in (False, True) if name != "int4" else (False,):
        wanted = generate(model, inputs, make(fixed), max_new_tokens=NEW, disable_compile=True)
        for number in breaks(model, inputs, wanted, lambda: make(fixed), place):  # noqa: B023
            cache = make(fixed)
            with pytest.raises(Stopped):
                interrupted(model, inputs, wanted, cache, place, Counter(number))
            if int(cache.get_seq_length()):
                again = generate(model, inputs, cache, max_new_tokens=NEW, disable_compile=True)
                assert torch.equal(again, wanted), (fixed, number)
            cache.check_integrity()


@pytest.mark.parametrize("place", ["extend", "propose", "processor", "criterion"])
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_a_cache_of_a_store_goes_back_to_what_it_shares(kind: str, place: str) -> None:
    lengths = (17, 9)
    model, (inputs, wanted) = tiny_model(kind), turn_of(kind, lengths)
    store = PrefixStore(model)
    cache = store.cache(**prompt(*lengths))
    store.commit(cache, generate(model, prompt(*lengths), cache))
    for number in breaks(model, inputs, wanted, lambda: store.cache(**inputs), place):
        cache = store.cache(**inputs)
        assert cache.num_shared
        with pytest.raises(Stopped):
            interrupted(model, inputs, wanted, cache, place, Counter(number))
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=NEW), wanted), number
        store.commit(cache, wanted)
        store.check_integrity()
        store.clear()
        cache = store.cache(**prompt(*lengths))
        store.commit(cache, generate(model, prompt(*lengths), cache))
        store.check_integrity()
