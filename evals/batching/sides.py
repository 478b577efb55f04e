"""Sides of the comparison: ours under load and at once, static padded batches, and transformers' generate_batch."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from evals.batching.workload import Chat
from hf_kvopt import Batcher, BatchStats


class Outcome(NamedTuple):
    """Results of one way to batch."""

    tokens: list[list[int]]
    seconds: float
    computed_tokens: int | None  # that went through the model, padding included; None: not told
    padded_tokens: int | None
    first_token_s: list[float]  # of each request, from its arrival on
    token_s: list[float]  # of each further token, mean of each request
    stats: BatchStats | None
    pool_use: list[float]  # held by requests, of the pool, at moments when requests waited for blocks
    is_clean: bool  # no block was held after the last request

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, over everything."""
        return sum(map(len, self.tokens)) / self.seconds


def alone(model: Any, chats: Sequence[Chat]) -> list[list[int]]:
    """Tokens of plain `generate()`, one request at a time."""
    outputs = []
    for chat in chats:
        ids = torch.tensor([chat.prompt], device=model.device)
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=chat.num_new, do_sample=False)
        outputs.append(output[0, len(chat.prompt) :].tolist())
    return outputs


def static(model: Any, chats: Sequence[Chat], batch_size: int) -> Outcome:
    """Batches in order of arrival, padded on the left, until their longest row is done; transformers' own cache."""
    outputs: list[list[int]] = []
    computed = useful = 0
    started = time.perf_counter()
    for first in range(0, len(chats), batch_size):
        batch = chats[first : first + batch_size]
        width, new = max(len(chat.prompt) for chat in batch), max(chat.num_new for chat in batch)
        rows = [[0] * (width - len(chat.prompt)) + chat.prompt for chat in batch]
        ids = torch.tensor(rows, device=model.device)
        pads = torch.tensor([width - len(chat.prompt) for chat in batch], device=model.device)
        mask = (torch.arange(width, device=model.device) >= pads[:, None]).long()
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        tokens = output[:, width:].tolist()
        outputs += [row[: chat.num_new] for row, chat in zip(tokens, batch, strict=True)]
        computed += len(batch) * (width + new - 1)
        useful += sum(len(chat.prompt) + chat.num_new - 1 for chat in batch)
    seconds = time.perf_counter() - started
    return Outcome(outputs, seconds, computed, computed - useful, [], [], None, [], True)


def stock(model: Any, chats: Sequence[Chat], pool_tokens: int, batch_tokens: int) -> Outcome:
    """Run transformers' continuous batching, all requests at once.

    Args:
        model: the model.
        chats: the requests.
        pool_tokens: that its cache holds; by default it takes most of a CPU's memory.
        batch_tokens: of one step at most.
    """
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=-(-pool_tokens // ContinuousBatchingConfig().page_size), max_batch_tokens=batch_tokens
        ),
    )
    manager.start()
    started = time.perf_counter()
    names = [manager.add_request(chat.prompt, max_new_tokens=chat.num_new) for chat in chats]
    done: dict[str, list[int]] = {}
    while len(done) < len(chats):
        result = manager.get_result(timeout=5)
        if result is not None and result.is_finished():
            done[result.request_id] = result.generated_tokens
        elif result is None and not manager.is_running():
            break
    seconds = time.perf_counter() - started
    manager.stop(block=True)
    return Outcome([done.get(name, []) for name in names], seconds, None, None, [], [], None, [], True)


def ours(model: PreTrainedModel, chats: Sequence[Chat], times: Sequence[float], **settings: Any) -> Outcome:
    """A `Batcher`; request i comes after `times[i]` seconds."""
    batcher = Batcher(model, **settings)
    with _watched(batcher) as pool_use:
        started = time.perf_counter()
        requests = []
        for chat, at in zip(chats, times, strict=True):
            time.sleep(max(0.0, started + at - time.perf_counter()))
            requests.append(batcher.submit(chat.prompt, max_new_tokens=chat.num_new, do_sample=False))
        tokens = [request.result() for request in requests]
        seconds = time.perf_counter() - started
    batcher.check_integrity()
    stats = batcher.stats
    batcher.close()
    told = [request.stats for request in requests]
    first = [one.first_token_s for one in told if one.first_token_s is not None]
    rest = [
        (one.total_s - one.first_token_s) / (one.new_tokens - 1)
        for one in told
        if one.new_tokens > 1 and one.total_s is not None and one.first_token_s is not None
    ]
    return Outcome(
        tokens, seconds, stats.computed_tokens, 0, first, rest, stats, pool_use, is_clean=stats.row_blocks == 0
    )


@contextmanager
def _watched(batcher: Batcher) -> Iterator[list[float]]:
    """Collect the use of the pool while requests wait for blocks, ten times a second."""
    use: list[float] = []
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.1):
            stats = batcher.stats
            if stats.waiting and stats.num_blocks and stats.filling + stats.decoding < batcher.config.max_rows:
                use.append(stats.row_blocks / stats.num_blocks)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield use
    finally:
        is_done.set()
        watcher.join()
