"""Measurement of one cell: prompts of one length with a known share, timed with and without sharing in turns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_kvopt
from evals._common.clock import Clock
from evals._common.memory import kv_bytes
from evals._common.models import Subject
from evals._common.prompts import pad_left

NEW_TOKENS = 8  # of the equality check
_RAGGED = 5  # tokens by which each row of a batch is shorter than the one before


class Cell(NamedTuple):
    """Prompts of up to `length` tokens; the store knows the share `hit` of them."""

    length: int
    batch: int
    hit: float


@dataclass
class Timings:
    """Result of a cell; entries i of both lists ran one after the other."""

    plain_ms: list[float] = field(default_factory=list)
    shared_ms: list[float] = field(default_factory=list)
    plain_tokens: int = 0
    shared_tokens: int = 0
    plain_bytes: int = 0
    shared_bytes: int = 0
    is_equal: bool = True

    @property
    def ratio(self) -> float:
        """Median of shared over plain time."""
        return median(s / p for s, p in zip(self.shared_ms, self.plain_ms, strict=True))


def measure(subject: Subject, cell: Cell, stream: Tensor, repeats: int) -> Timings:
    """Time `repeats` prompts that share a prefix and differ after it, each through both sides."""
    timings, store = Timings(), hf_kvopt.PrefixStore(subject.model)
    # Hooked throughout: to a store, a model with another hook is another model.
    with _counted(subject.model) as positions:
        _measure(subject, cell, stream, repeats, store, positions, timings)
    hf_kvopt.disable(subject.model)
    store.free()
    return timings


def _measure(
    subject: Subject,
    cell: Cell,
    stream: Tensor,
    repeats: int,
    store: hf_kvopt.PrefixStore,
    positions: list[int],
    timings: Timings,
) -> None:
    model, clock = subject.model, Clock(subject.model.device)
    known = stream[: int(cell.length * cell.hit)]
    for repeat in range(-1, repeats):
        inputs = _prompts(subject, cell, known, stream, repeat + 1)
        if repeat < 0:
            # The known part was an earlier prompt; this is also the warm-up and the equality check.
            _share(model, store)
            if len(known) > 1:
                _generate(model, {"input_ids": known[None].to(model.device)}, 1)
            _check(model, store, inputs, positions, timings)
            continue
        order = (False, True) if repeat % 2 else (True, False)
        for is_shared in order:
            _share(model, store if is_shared else None)
            clock.settle()
            positions.clear()
            elapsed = clock.time_ms(partial(_generate, model, inputs, 1))
            (timings.shared_ms if is_shared else timings.plain_ms).append(elapsed)
            # If the store knows more of a prompt than the cell states, it is another measurement.
            expected = timings.shared_tokens if is_shared else timings.plain_tokens
            if sum(positions) != expected:
                raise RuntimeError(f"{cell}: expected {expected} positions to be computed, got {sum(positions)}")


def _check(
    model: PreTrainedModel,
    store: hf_kvopt.PrefixStore,
    inputs: dict[str, Tensor],
    positions: list[int],
    timings: Timings,
) -> None:
    """Generate on both sides: tokens must be equal; forwards and memory are counted."""
    results = []
    for is_shared in (False, True):
        _share(model, store if is_shared else None)
        positions.clear()
        output = _generate(model, inputs, NEW_TOKENS, return_dict_in_generate=True)
        prefill = sum(positions) - len(inputs["input_ids"]) * (NEW_TOKENS - 1)
        size = store.stats().used_bytes if is_shared else kv_bytes(output[hf_kvopt.CACHE_KEYWORD]).used
        if is_shared:
            timings.shared_tokens, timings.shared_bytes = prefill, size
        else:
            timings.plain_tokens, timings.plain_bytes = prefill, size
        results.append(output.sequences)
    timings.is_equal = torch.equal(*results)


def _prompts(subject: Subject, cell: Cell, known: Tensor, stream: Tensor, number: int) -> dict[str, Tensor]:
    """Return a batch whose rows begin with `known` and continue differently from all rows of any batch."""
    rows, vocab = [], int(stream.max()) + 1
    for row in range(cell.batch):
        length = max(2, cell.length - _RAGGED * row)
        start = len(stream) // 3 + (number * cell.batch + row) * cell.length
        own = stream.roll(-start)[: max(1, length - len(known))]
        # The stream repeats: rows differ at the first token after `known`.
        own[0] = (number * cell.batch + row) % vocab
        rows.append(torch.cat([known[: length - len(own)], own]))
    ids, mask = pad_left(rows, 0)
    return {"input_ids": ids.to(subject.model.device), "attention_mask": mask.to(subject.model.device)}


def _share(model: PreTrainedModel, store: hf_kvopt.PrefixStore | None) -> None:
    hf_kvopt.enable(model, cache="paged", prefix_sharing=False if store is None else store)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int, **options: Any) -> Any:
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return model.generate(  # type: ignore[operator]
        **inputs, **length, do_sample=False, pad_token_id=0, **options
    )


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect the number of positions of every forward, padding included."""
    positions: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield positions
    finally:
        hook.remove()
