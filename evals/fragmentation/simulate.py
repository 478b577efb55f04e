"""Simulation of a serving loop over a fixed pool: admit in order of arrival, one token a step and sequence, release."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from evals.fragmentation.workload import Request

_LOOK_EVERY = 16  # steps: measuring costs more than stepping


class Use(NamedTuple):
    """Token slots at one moment."""

    used: int  # hold a token that is still needed, shared ones counted once
    reserved: int  # allocated
    unusable: int  # free, but too scattered for the waiting request
    metadata_bytes: int


class Strategy(Protocol):
    """Strategy of allocating a pool."""

    @property
    def num_running(self) -> int:
        """Number of sequences that generate."""
        ...

    def admit(self, request: Request) -> bool:
        """Admit a request, if it fits now; return whether it did."""
        ...

    def step(self) -> list[Request]:
        """Add one token to every sequence; return requests that were preempted, to be admitted again."""
        ...

    def use(self, waiting: Request | None) -> Use:
        """Return the current use."""
        ...


class Outcome(NamedTuple):
    """Means over every 16th step in which something ran."""

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
        """Share of allocated slots that held nothing, over time."""
        return self.internal / self.reserved if self.reserved else 0.0


def simulate(strategy: Strategy, requests: Sequence[Request]) -> Outcome:
    """Run until all requests are done.

    Raises:
        ValueError: a request does not fit in an empty pool.
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
