"""One cell: prompts of one length of which a share is known, timed with and without sharing in turns."""

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
    """Prompts of up to `length` tokens, `hit` of which the store knows."""

    length: int
    batch: int
    hit: float


@dataclass
class Timings:
    """What a cell gave; entry i of both lists ran one after the other."""

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
    """Time `repeats` prompts that begin alike and go on unlike, each sent through both sides."""
    model, clock, timings = subject.model, Clock(subject.model.device), Timings()
    store = hf_kvopt.PrefixStore(model)
    known = stream[: int(cell.length * cell.hit)]
    for repeat in range(-1, repeats):
        inputs = _prompts(subject, cell, known, stream, repeat + 1)
        if repeat < 0:
            # The known part was somebody's prompt before; also the warm-up, and the equality check.
            _share(model, store)
            if len(known) > 1:
                _generate(model, {"input_ids": known[None].to(model.device)}, 1)
            _check(model, store, inputs, timings)
            continue
        order = (False, True) if repeat % 2 else (True, False)
        for is_shared in order:
            _share(model, store if is_shared else None)
            clock.settle()
            with _counted(model) as positions:
                elapsed = clock.time_ms(partial(_generate, model, inputs, 1))
            (timings.shared_ms if is_shared else timings.plain_ms).append(elapsed)
            # A prompt that the store knows more of than the cell says is another measurement.
            expected = timings.shared_tokens if is_shared else timings.plain_tokens
            if sum(positions) != expected:
                raise RuntimeError(f"{cell}: expected {expected} positions to be computed, got {sum(positions)}")
    hf_kvopt.disable(model)
    store.free()
    return timings


def _check(model: PreTrainedModel, store: hf_kvopt.PrefixStore, inputs: dict[str, Tensor], timings: Timings) -> None:
    """Generate on both sides: tokens must be equal; forwards and memory are counted."""
    results = []
    for is_shared in (False, True):
        _share(model, store if is_shared else None)
        with _counted(model) as positions:
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
    """A batch whose rows begin with `known` and go on as no other row does, of this batch or of another number."""
    rows, vocab = [], int(stream.max()) + 1
    for row in range(cell.batch):
        length = max(2, cell.length - _RAGGED * row)
        start = len(stream) // 3 + (number * cell.batch + row) * cell.length
        own = stream.roll(-start)[: max(1, length - len(known))]
        # The stream comes round: rows part at their first token of their own.
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
