"""The policy: plans from measurements, plain decoding where that is faster, and its warnings."""

import logging

import pytest
import torch

from hf_kvopt import speculative
from hf_kvopt.speculation.drafters.base import Plan
from hf_kvopt.speculation.loop.costs import Times
from hf_kvopt.speculation.loop.policy import NOTHING, Policy
from tests.helpers import eager_tokens, generate, prompt, tiny_model
from tests.speculation.drafters import Forest
from tests.speculation.test_equality import drafter


def simulate(policy: Policy, steps: int, alpha: float, draft_s: float, read_s: float, batch: int = 1) -> list[Plan]:
    """Run steps of a machine with 10 ms a forward and `read_s` a token; alpha is the acceptance of a drafted token."""
    generator = torch.Generator().manual_seed(0)
    plans = []
    for _ in range(steps):
        plan = policy.plan(range(batch), remaining=1000)
        plans.append(plan)
        if plan.num_nodes:
            policy.note_draft(batch, plan.gamma, draft_s * plan.gamma)
        depths = {}
        for row in range(batch):
            tries = torch.rand(plan.gamma, generator=generator) < alpha
            depths[row] = plan.gamma, int(tries.long().cumprod(0).sum())
        nodes = plan.num_nodes + 1
        tokens = sum(accepted + 1 for _, accepted in depths.values())
        policy.note_step(plan, batch, nodes, draft_s * plan.gamma, 0.01 + read_s * nodes, depths, tokens)
    return plans


def make(**options: object) -> Policy:
    settings = {"gamma": None, "num_nodes": 0, "top_k": 1, "max_gamma": 8, "can_tree": False, "may_stop": True}
    return Policy(**{**settings, **options})  # type: ignore[arg-type]


def test_good_drafts_are_made_deeper_than_bad_ones() -> None:
    deep = simulate(make(), 120, alpha=0.95, draft_s=0.0005, read_s=0.0002)
    flat = simulate(make(), 120, alpha=0.4, draft_s=0.0005, read_s=0.0002)
    mean = [sum(plan.gamma for plan in plans[-40:]) / 40 for plans in (deep, flat)]
    assert mean[0] > 6
    assert 1 <= mean[1] < 4


def test_where_it_loses_plain_steps_are_taken_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = make()
    with caplog.at_level(logging.WARNING):
        plans = simulate(policy, 600, alpha=0.1, draft_s=0.005, read_s=0.002)
    assert sum(plan == NOTHING for plan in plans) > 500
    assert policy.stats.fell_back
    assert len([r for r in caplog.records if "slower than plain" in r.message]) == 1
    assert plans[-200:].count(NOTHING) < 200, "it is never tried again"


def test_it_comes_back_when_drafts_become_good() -> None:
    policy = make()
    simulate(policy, 100, alpha=0.05, draft_s=0.005, read_s=0.002)
    plans = simulate(policy, 400, alpha=0.95, draft_s=0.0005, read_s=0.0001)
    assert plans[-50:].count(NOTHING) < 5


def test_a_step_that_was_held_up_is_no_reason_to_stop() -> None:
    policy = make()
    simulate(policy, 12, alpha=0.8, draft_s=0.0005, read_s=0.0002)
    policy.note_step(Plan(3, 3), 1, 4, 0.001, 5.0, {0: (3, 2)}, 3)
    assert NOTHING not in simulate(policy, 40, alpha=0.8, draft_s=0.0005, read_s=0.0002)


def test_depths_that_were_slow_once_are_tried_again() -> None:
    policy = make()
    # While something else runs, many tokens are slow.
    simulate(policy, 14, alpha=0.9, draft_s=0.0005, read_s=0.03)
    plans = simulate(policy, 400, alpha=0.9, draft_s=0.0005, read_s=0.0001)
    assert sum(plan.gamma for plan in plans[-40:]) / 40 > 5


def test_the_first_step_of_a_size_is_not_measured() -> None:
    policy = make()
    for seconds in (3.0, 0.01, 0.01):
        policy.note_step(NOTHING, 1, 1, None, seconds, {0: (0, 0)}, 1)
    for seconds in (2.0, 0.012, 0.012):
        policy.note_draft(1, 4, seconds)
        policy.note_step(Plan(4, 4), 1, 5, seconds, seconds, {0: (4, 3)}, 4)
    assert policy.read_times.at(1) == pytest.approx(0.01)
    assert policy.read_times.at(5) == pytest.approx(0.012)
    assert policy.known.draft_times[1].at(4) == pytest.approx(0.012)


def work_lost(alpha: float, steps: int, batch: int = 1, column: float = 0.08) -> float:
    """Return the plain steps that trials cost, less the tokens that they gave, in a text of so many steps."""
    policy, plain = make(), 0.01
    plans = simulate(policy, steps, alpha, draft_s=0.0002, read_s=column * plain, batch=batch)
    seconds = sum((column * plain * batch + 0.0002) * plan.gamma for plan in plans)
    gained = (policy.stats.tokens - policy.stats.row_steps) / batch
    return (seconds / plain - gained) / steps


@pytest.mark.parametrize("steps", [48, 256])
def test_a_drafter_that_loses_costs_little(steps: int) -> None:
    # A column costs 8 % of a plain step, as on SmolLM2-135M on two cores, and nothing is ever accepted.
    assert work_lost(0.0, steps) < 0.04
    policy = make()
    simulate(policy, 400, alpha=0.0, draft_s=0.0002, read_s=0.0008)
    policy.begin(None, True)
    plans = simulate(policy, steps, alpha=0.0, draft_s=0.0002, read_s=0.0008)
    # Once that is known, another text costs some tokens of drafts.
    assert sum(plan.gamma for plan in plans) * 0.1 / steps < 0.02


def uneven(policy: Policy, steps: int, gains: list[int], rows_leave: bool = True) -> list[Plan]:
    """Run steps in which row i accepts `gains[i]` tokens of any draft, and each step is as slow as it reads tokens."""
    policy.begin(None, rows_leave)
    plans, rows = [], range(len(gains))
    for _ in range(steps):
        plan = policy.plan(rows, remaining=1000)
        plans.append(plan)
        accepted = {row: (plan.gamma, min(plan.gamma, gain)) for row, gain in enumerate(gains)}
        seconds = 0.004 + 0.0001 * len(gains) * (1 + plan.gamma)
        if plan.num_nodes:
            policy.note_draft(len(gains), plan.gamma, 0.0005)
        tokens = sum(1 + count for _, count in accepted.values())
        policy.note_step(plan, len(gains), 1 + plan.gamma, 0.0005, seconds, accepted, tokens)
    return plans


def test_a_batch_is_as_fast_as_its_slowest_row() -> None:
    # 3.2 tokens a step in the mean, but two rows get a plain step's one: the batch is done no sooner.
    assert uneven(make(), 200, [6, 6, 6, 0, 0, 0]).count(NOTHING) > 100
    assert uneven(make(), 200, [3, 3, 3, 3, 3, 3]).count(NOTHING) < 10


def test_rows_that_leave_make_the_others_cheaper() -> None:
    paces = Policy(None, 0, 1, 8, False, True).paces
    for _ in range(50):
        paces.note({0: 4, 1: 0})
    assert paces.counting([0, 1], 3.0, fixed=0.0) > 1.25 * paces.counting([0, 1], 3.0, fixed=1.0)
    assert paces.counting([0], 3.0, fixed=1.0) == 3.0
    paces.begin(rows_leave=False)
    assert paces.counting([0, 1], 3.0, fixed=0.0) == pytest.approx(3.0)
    paces.note({0: 9, 1: 1})
    assert paces.counting([0, 1], 3.0, fixed=0.0) == paces.counting([0, 1], 3.0, fixed=1.0)


def test_what_sampled_calls_learn_is_not_believed_of_greedy_ones() -> None:
    policy = make()
    for _ in range(2):
        policy.begin((1.0, 50, 1.0, None), True)
        assert simulate(policy, 80, alpha=0.05, draft_s=0.005, read_s=0.002)[-40:].count(NOTHING) > 30
        policy.begin(None, True)
        assert simulate(policy, 80, alpha=0.9, draft_s=0.0005, read_s=0.0002).count(NOTHING) < 10
    greedy = policy.known
    for temperature in range(1000):
        policy.begin((temperature, 50, 1.0, None), True)
        policy.begin(None, True)
    assert len(policy._known) < 50
    assert policy.known is greedy


def test_without_fallback_every_step_drafts() -> None:
    plans = simulate(make(may_stop=False), 60, alpha=0.0, draft_s=0.01, read_s=0.01)
    assert NOTHING not in plans


def test_a_gamma_that_is_asked_for_is_kept() -> None:
    assert {plan.gamma for plan in simulate(make(gamma=5, may_stop=False), 30, 0.9, 0.001, 0.001)} == {5}


def test_trees_for_one_row_and_chains_for_more() -> None:
    options = {"can_tree": True, "num_nodes": 12, "gamma": 4}
    assert make(**options, may_stop=False).plan(range(1), 100)[:3] == (4, 12, 1)
    assert make(**options, may_stop=False).plan(range(3), 100).is_chain


def test_trees_are_drawn_only_where_they_are_asked_for() -> None:
    plans = simulate(make(can_tree=True, num_nodes=None), 60, alpha=0.9, draft_s=0.0002, read_s=0.0002)
    assert all(plan.is_chain for plan in plans)


def test_no_more_is_drafted_than_the_text_may_still_get() -> None:
    assert make(may_stop=False).plan(range(1), remaining=1) == NOTHING
    assert make(may_stop=False, gamma=8).plan(range(1), remaining=4).gamma == 3


def test_stats_count_what_happened() -> None:
    wanted = eager_tokens("full", 9, 6, max_new_tokens=20)
    spec = speculative(drafter("assistant"), gamma=3, fallback=False)
    assert torch.equal(generate(tiny_model(), prompt(9, 6), custom_generate=spec, max_new_tokens=20), wanted)
    stats = spec.stats
    # The first token of each row comes from the prompt.
    assert stats.tokens + stats.plain_tokens == 2 * 19
    assert stats.mean_accepted_length == stats.tokens / stats.row_steps
    assert stats.accepted_by_depth == sorted(stats.accepted_by_depth, reverse=True)
    assert stats.acceptance_by_depth[0] == stats.accepted_by_depth[0] / stats.proposed_by_depth[0]
    assert sum(stats.accepted_by_depth) + stats.row_steps >= stats.tokens
    assert stats.calls == 1
    assert min(stats.draft_s, stats.verify_s) > 0


def test_generation_goes_on_equal_through_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = eager_tokens("full", 30, max_new_tokens=60)
    # All wrong: it falls back, and the drafter is told later what it missed.
    spec = speculative(Forest(wanted, range(200)), gamma=4)
    got = generate(tiny_model(), prompt(30), custom_generate=spec, max_new_tokens=60)
    assert torch.equal(got, wanted)
    spec = speculative(drafter("assistant"), gamma=4)
    begin = spec.policy.begin

    def begin_idle(*settings: object) -> None:
        begin(*settings)  # type: ignore[arg-type]
        spec.policy._num_plain, spec.policy._probe = 1, 30

    monkeypatch.setattr(spec.policy, "begin", begin_idle)
    assert torch.equal(generate(tiny_model(), prompt(30), custom_generate=spec, max_new_tokens=60), wanted)
    assert spec.stats.plain_steps >= 28
    assert spec.stats.tokens > 2


def test_what_was_measured_is_not_extrapolated_to_nothing() -> None:
    times = Times(growth=0.1)
    for size, seconds in (
        (4, 1e-3),
        (4, 1e-3),
        (8, 9e-3),
        (8, 9e-3),
        (4, 1e-3),
        (8, 9e-3),
    ):  # a line that would be below zero at 1
        times.note(size, seconds)
    assert times.at(1) > 1e-4
    for _ in range(2):
        times.note(1, 2e-3)
    assert times.at(1) == 2e-3
