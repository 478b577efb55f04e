"""One run of a serving loop over a fixed pool: admit in order of arrival, one token a step and sequence, release."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from evals.fragmentation.workload import Request

_LOOK_EVERY = 16  # steps: looking costs more than stepping


class Use(NamedTuple):
    """Token slots at one moment."""

    used: int  # hold a token that is still needed, shared ones counted once
    reserved: int  # handed out
    unusable: int  # free, but too scattered for the request that waits
    metadata_bytes: int


class Strategy(Protocol):
    """A way of handing a pool out."""

    @property
    def num_running(self) -> int:
        """Sequences that generate."""
        ...

    def admit(self, request: Request) -> bool:
        """Take a request in, if it fits now."""
        ...

    def step(self) -> list[Request]:
        """One token for every sequence; gives back requests that had to be put out, to come again."""
        ...

    def use(self, waiting: Request | None) -> Use:
        """What is held now."""
        ...


class Outcome(NamedTuple):
    """Means over steps, one in 16, in which something ran."""

    used: float
    reserved: float
    internal: float
    external: float
    metadata_bytes: float
    peak_reserved: int
    concurrency: float
    peak_concurrency: int
    steps: int
    preemptions: int

    @property
    def waste(self) -> float:
        """Part of what was handed out that held nothing, over time."""
        return self.internal / self.reserved if self.reserved else 0.0


def simulate(strategy: Strategy, requests: Sequence[Request]) -> Outcome:
    """Run until all requests are done.

    Raises:
        ValueError: a request that fits in no empty pool.
    """
    coming, waiting = deque(requests), deque[Request]()
    uses, running = [], []
    step = preemptions = 0
    while coming or waiting or strategy.num_running:
        while coming and coming[0].arrival <= step:
            waiting.append(coming.popleft())
        while waiting and strategy.admit(waiting[0]):
            waiting.popleft()
        if waiting and not strategy.num_running:
            raise ValueError(f"a request of {waiting[0].prompt_len} tokens fits in no empty pool: make the pool larger")
        again = strategy.step()
        preemptions += len(again)
        waiting.extendleft(again)
        if strategy.num_running and step % _LOOK_EVERY == 0:
            uses.append(strategy.use(waiting[0] if waiting else None))
            running.append(strategy.num_running)
        step += 1
    count = len(uses)
    return Outcome(
        used=sum(use.used for use in uses) / count,
        reserved=sum(use.reserved for use in uses) / count,
        internal=sum(use.reserved - use.used for use in uses) / count,
        external=sum(use.unusable for use in uses) / count,
        metadata_bytes=sum(use.metadata_bytes for use in uses) / count,
        peak_reserved=max(use.reserved for use in uses),
        concurrency=sum(running) / count,
        peak_concurrency=max(running),
        steps=step,
        preemptions=preemptions,
    )
