"""The arithmetic of blocks: no forward runs out of them, nobody starves, and nothing is left over; without a model."""

import random
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from hf_kvopt import PrefixStore
from hf_kvopt.batching.job import Job
from hf_kvopt.batching.packed import PackedCache, pack
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.room import Room, blocks_needed
from hf_kvopt.batching.rows import Rows
from hf_kvopt.batching.rules import Rules
from hf_kvopt.batching.scheduler import Scheduler, StepPlan
from hf_kvopt.prefix.batch import BatchCache
from tests.helpers import tiny_config

BLOCK = 16


@dataclass
class Simulation:
    """A scheduler whose forwards write random states, and whose tokens are drawn."""

    kind: str
    max_blocks: int
    max_rows: int
    chunk: int
    shares: bool
    rng: random.Random
    host_tier: int | None = None
    is_forgetful: bool = True  # with a tier: lets go of what is known now and then
    finished: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = PrefixStore(tiny_config(self.kind), max_tokens=self.max_blocks * BLOCK, host_tier=self.host_tier)
        self.rows = Rows(self.store)
        self.scheduler = Scheduler(self.store, self.rows, self.max_rows, self.chunk, self.shares)
        self.num_jobs = 0

    def submit(self, prompt: list[int], new: int, priority: float = 0.0) -> None:
        rules = Rules(new, frozenset(), False, LogitsProcessorList(), StoppingCriteriaList(), None, None, None)
        self.num_jobs += 1
        self.scheduler.add(Job(Request(prompt), rules, (self.num_jobs - priority, self.num_jobs)))

    def step(self) -> StepPlan:
        if self.host_tier and self.is_forgetful and self.rng.random() < 0.5:  # what is known is found below the device
            self.store.flush()
            with self.store.lock:
                self.store.index.evict(self.max_blocks)
        drafts = [[1] * self.rng.choice((0, 0, 1, 5)) for _ in self.rows.jobs]
        running = {*self.scheduler.filling, *self.rows.jobs}
        plan = self.scheduler.plan(drafts)
        if plan.is_empty:
            assert self.scheduler.wait(), "nothing can go on"
            return plan
        taking = [*self.scheduler.filling, *self.rows.jobs]
        oldest = min(taking, key=_rank)
        assert not running or oldest.rank <= min(map(_rank, running)), "the job that came first always takes part"
        had = len(oldest.text), oldest.num_held
        free = [allocator.num_free for allocator in self.store.allocators]
        needed = self.scheduler._needed(max(map(len, plan.drafts), default=0), plan.portions)
        before = [allocator.num_blocks for allocator in self.store.allocators]
        self._forward(plan)
        assert [allocator.num_blocks for allocator in self.store.allocators] == before, "the forward needed more room"
        taken = [was - allocator.num_free for was, allocator in zip(free, self.store.allocators, strict=True)]
        assert all(number <= most for number, most in zip(taken, needed, strict=True))
        self._settle(plan)
        self.store.check_integrity()
        assert oldest in self.finished or (len(oldest.text), oldest.num_held) != had, "it makes progress at every step"
        return plan

    def _forward(self, plan: StepPlan) -> None:
        parts = []
        if self.rows.jobs:
            parts.append((self.rows.cache, [1 + len(draft) for draft in plan.drafts]))
        parts += [(job.cache, [number]) for job, number in plan.portions]
        packed = PackedCache(pack(parts, torch.device("cpu")))
        for idx in range(len(self.rows.cache.layers)):
            states = torch.zeros(1, 2, sum(sum(counts) for _, counts in parts), 8)
            packed.update(states, states, idx)

    def _settle(self, plan: StepPlan) -> None:
        for job, draft in zip(self.rows.jobs, plan.drafts, strict=True):
            self._take(job, 1 + self.rng.randint(0, len(draft)))
        self.rows.cut_back(1 + max(map(len, plan.drafts), default=0))
        for job, _ in plan.portions:
            self.scheduler.file(job)
            if not job.num_missing:
                self.scheduler.filling.remove(job)
                self._take(job, 1)
                if job.is_done:
                    job.close()
                    self.finished.append(job)
                else:
                    self.rows.join(job)
        leaving = [row for row, job in enumerate(self.rows.jobs) if job.is_done]
        self.finished += [self.rows.jobs[row] for row in leaving]
        self.scheduler.file_rows(leaving)
        self.rows.leave(leaving)

    def _take(self, job: Job, number: int) -> None:
        for _ in range(number):
            job.text.append(self.rng.randrange(5))
            if job.num_new >= job.rules.max_new_tokens:
                job.end("length")
                return


def _rank(job: Job) -> tuple[float, int]:
    return job.rank


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Simulation, list[tuple[int, list[int], int, float]]]:
    """Draw a pool and arrivals (step, prompt, new tokens, priority), some prompts beginning alike."""
    max_blocks = draw(st.integers(4, 24))
    simulation = Simulation(
        draw(st.sampled_from(("full", "mixed"))),
        max_blocks,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        draw(st.booleans()),
        random.Random(draw(st.integers(0, 2**16))),
        draw(st.sampled_from((None, 2**16, 2**30))),
    )
    common = [simulation.rng.randrange(5) for _ in range(64)]
    arrivals = []
    for _ in range(draw(st.integers(1, 7))):
        longest = (max_blocks - 1) * BLOCK
        length = draw(st.integers(1, longest - 1))
        new = draw(st.integers(1, min(40, longest - length)))
        prompt = [simulation.rng.randrange(5) for _ in range(length)]
        shared = draw(st.integers(0, min(length, 64)))
        prompt[:shared] = common[:shared]
        arrivals.append((draw(st.integers(0, 12)), prompt, new, draw(st.sampled_from((0.0, 0.0, 3.0)))))
    return simulation, arrivals


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(workloads())
def test_no_forward_runs_out_of_blocks_and_everybody_ends(workload) -> None:
    simulation, arrivals = workload
    steps = 0
    while arrivals or not simulation.scheduler.is_idle:
        for arrival in [one for one in arrivals if one[0] <= steps]:
            simulation.submit(*arrival[1:])
            arrivals.remove(arrival)
        if not simulation.scheduler.is_idle:
            simulation.step()
        steps += 1
        assert steps < 4000, "some job is never done"
    assert len(simulation.finished) == simulation.num_jobs
    for job in simulation.finished:
        assert job.num_new == job.rules.max_new_tokens
    simulation.scheduler.close()
    simulation.store.index.clear()
    assert all(allocator.num_free == allocator.num_blocks for allocator in simulation.store.allocators)


def test_counted_blocks_are_those_that_reserve_takes() -> None:
    store = PrefixStore(tiny_config("full"))
    cache = BatchCache(store.blocks)
    states = torch.zeros(1, 2, 20, 8)
    for idx in range(2):
        cache.update(states, states, idx)
    table = cache.tables[0]
    store.index.insert((None, None), list(range(20)), [table.rows[0]])  # shares the half full block
    for number, expected in ((1, 1), (12, 1), (13, 2), (28, 2), (29, 3)):
        assert blocks_needed(table, number) == expected
    free = table.allocator.num_free
    for idx in range(2):
        cache.update(states[:, :, :13], states[:, :, :13], idx)
    assert free - table.allocator.num_free == 2


def test_room_counts_known_texts_that_nobody_holds() -> None:
    store = PrefixStore(tiny_config("full"), max_tokens=8 * BLOCK)
    room, cache = Room(store), BatchCache(store.blocks)
    states = torch.zeros(1, 2, 6 * BLOCK, 8)
    for idx in range(2):
        cache.update(states, states, idx)
    assert room.has([2])
    assert not room.has([3])
    store.index.insert((None, None), list(range(4 * BLOCK)), [cache.tables[0].rows[0]])
    assert not room.has([3]), "a row holds them as well"
    cache.close()
    assert room.has([8])
    store.index.pin(store.index.match((None, None), list(range(2 * BLOCK))), 1)
    assert room.has([6])
    assert not room.has([7])
    room.take([6])
    assert store.allocators[0].num_free >= 6


def test_the_job_that_came_last_gives_way_and_goes_on_before_later_ones() -> None:
    simulation = Simulation("full", 8, 4, 64, True, random.Random(0))
    for _ in range(3):
        simulation.submit([simulation.rng.randrange(5) for _ in range(30)], 50)
    while not simulation.scheduler.num_preempted:
        simulation.step()
    assert [job.rank[1] for job in simulation.scheduler.waiting][-1] == 3
    simulation.submit([1] * 20, 5)
    while not simulation.scheduler.is_idle:
        simulation.step()
    assert simulation.finished[0].rank[1] == 1
    assert simulation.finished[-1].rank[1] in (3, 4)


def test_a_row_that_joins_copies_no_block_to_go_on() -> None:
    simulation = Simulation("full", 8, 4, 64, True, random.Random(0))
    simulation.submit([1] * 20, 6)
    simulation.step()
    simulation.step()
    allocator = simulation.store.allocators[0]
    assert allocator.num_blocks - allocator.num_free == 2


def test_a_prompt_that_takes_many_steps_shares_them_with_rows_that_decode() -> None:
    simulation = Simulation("full", 24, 4, 10, True, random.Random(0))
    simulation.submit([1, 2, 3], 30)
    simulation.step()
    simulation.submit([2] * 100, 3)
    plans = [simulation.step() for _ in range(10)]
    assert [sum(number for _, number in plan.portions) for plan in plans] == [10] * 10
    assert all(len(plan.drafts) == 1 for plan in plans)
