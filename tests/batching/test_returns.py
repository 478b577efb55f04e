"""Blocks of jobs that come back are counted like those of jobs that are filled; held open here, without a model."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hf_kvopt.prefix.tiers import restore
from tests.batching.test_scheduler import BLOCK, Simulation


class Gate:
    """Copies to the device, which wait while it is closed."""

    def __init__(self) -> None:
        self.is_open, self.begun, self.count = threading.Event(), threading.Event(), 0
        self.is_open.set()

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        self.begun.set()
        assert self.is_open.wait(60)
        return _WRITE(*args)


_WRITE = restore._write


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(restore, "_write", made)
    yield made
    made.is_open.set()


def known_below(simulation: Simulation, text: list[int]) -> None:
    """Let the host alone know a text."""
    simulation.submit([*text, 0], 1)
    drain(simulation)
    simulation.store.flush()
    with simulation.store.lock:
        simulation.store.index.evict(1000)


def drain(simulation: Simulation) -> None:
    for _ in range(500):
        if simulation.scheduler.is_idle:
            return
        simulation.step()
    raise AssertionError("some job is never done")


def until_arriving(simulation: Simulation, gate: Gate) -> None:
    """Plan, without a forward, until a copy was begun."""
    gate.begun.clear()
    for _ in range(500):
        if simulation.scheduler.arriving:
            assert gate.begun.wait(60)
            return
        simulation.scheduler.plan([[] for _ in simulation.rows.jobs])
        simulation.scheduler.wait()
    raise AssertionError("nothing comes back")


def with_host(max_blocks: int) -> Simulation:
    return Simulation("full", max_blocks, 4, 64, True, random.Random(0), 2**30, False)


def test_what_an_arriving_job_takes_later_is_promised_to_it(gate: Gate) -> None:
    own = with_host(12)
    known_below(own, [1] * 2 * BLOCK)
    gate.is_open.clear()
    own.submit([1] * 2 * BLOCK + [2] * 6 * BLOCK, 3)  # two blocks come back, and seven more are read
    until_arriving(own, gate)
    own.submit([3] * 5 * BLOCK, 3)
    for _ in range(50):  # what is known of the second one is found out
        own.scheduler.plan([])
        own.scheduler.wait()
    assert [len(own.scheduler.waiting), len(own.scheduler.filling)] == [1, 0]
    gate.is_open.set()
    drain(own)
    assert own.scheduler.num_preempted == 0
    own.scheduler.close()


def test_an_arriving_job_gives_way_to_a_row_that_came_before(gate: Gate) -> None:
    own = with_host(7)
    known_below(own, [1] * 4 * BLOCK)
    own.submit([2] * BLOCK, 3 * BLOCK)
    own.step()
    own.step()
    gate.is_open.clear()
    own.submit([1] * 4 * BLOCK + [3], 1)
    until_arriving(own, gate)
    oldest = own.rows.jobs[0]
    threading.Timer(0.2, gate.is_open.set).start()
    while len(oldest.text) < 4 * BLOCK:  # its fourth block is one of those that come back
        own.step()
    assert oldest.request.preemptions == 0
    drain(own)
    assert own.store.stats().restored >= 4  # what it lost while it waited comes back once more
    own.scheduler.close()


def test_a_text_that_comes_back_is_waited_for_by_others_that_begin_alike(gate: Gate) -> None:
    own = with_host(30)
    known_below(own, [1] * 4 * BLOCK)
    gate.is_open.clear()
    for _ in range(3):
        own.submit([1] * 4 * BLOCK + [3], 1)
    until_arriving(own, gate)
    own.scheduler.plan([])
    assert [len(own.scheduler.arriving), len(own.scheduler.waiting)] == [1, 2]
    gate.is_open.set()
    drain(own)
    assert own.store.stats().restored == 4
    own.scheduler.close()


def test_a_text_is_looked_for_again_where_the_model_changed(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    own = with_host(30)
    key_of = own.store.key_of
    monkeypatch.setattr(own.store, "key_of", lambda namespace: ("other weights", namespace))
    known_below(own, [1] * 4 * BLOCK)
    monkeypatch.setattr(own.store, "key_of", key_of)
    own.scheduler.forget_keys()
    own.submit([1] * 4 * BLOCK + [3], 1)
    own.scheduler.plan([])
    own.scheduler.wait()
    monkeypatch.setattr(own.store, "key_of", lambda namespace: ("other weights", namespace))
    own.scheduler.forget_keys()
    drain(own)
    assert own.store.stats().restored == 4
    own.scheduler.close()


def test_a_text_is_looked_for_again_where_its_beginning_was_let_go_of(gate: Gate) -> None:
    own = with_host(30)
    known_below(own, [1] * 6 * BLOCK)
    own.submit([1] * 2 * BLOCK + [3], 1)  # two blocks lie on the device again
    drain(own)
    own.submit([1] * 6 * BLOCK + [3], 1)
    own.scheduler.plan([])
    own.scheduler.wait()
    with own.store.lock:
        own.store.index.evict(1000)
    drain(own)
    assert own.store.stats().restored == 2 + 6
    own.scheduler.close()
