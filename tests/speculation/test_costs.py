"""Costs: lines through medians, and acceptance by depth, which fades where it is not tried."""

import pytest

from hf_kvopt.speculation.loop.costs import Rates, Times


def test_sizes_that_were_not_met_are_read_off_the_line() -> None:
    times = Times(growth=1.0)
    for size in (2, 4, 8):
        for _ in range(3):
            times.note(size, 0.001 + 0.002 * size)
    assert times.line().at(6) == pytest.approx(0.013)


def test_one_size_is_guessed_by_its_growth() -> None:
    dear, cheap = Times(growth=1.0), Times(growth=0.1)
    for times in (dear, cheap):
        times.note(4, 0.02)
    assert dear.line().at(8) == pytest.approx(0.04)
    assert cheap.line().at(8) == pytest.approx(0.022)


def test_a_size_that_was_met_once_does_not_bend_the_line() -> None:
    times = Times(growth=1.0)
    for size in (1, 2):
        for _ in range(2):
            times.note(size, 0.01 * size)
    times.note(3, 5.0)
    assert times.line().at(3) == pytest.approx(0.03)


def test_a_line_never_falls() -> None:
    times = Times(growth=1.0)
    for _ in range(2):
        times.note(1, 0.02)
        times.note(8, 0.01)
    assert times.line().slope == 0


def test_expected_tokens_and_depth_are_those_that_were_seen() -> None:
    rates = Rates()
    for _ in range(400):
        rates.note(4, [(2, 1), (4, 4)])
    tokens, depth = rates.expected(4)
    assert depth == pytest.approx(3, abs=0.05)
    assert tokens == pytest.approx(1 + 2.5, abs=0.05)


def test_what_is_not_tried_any_more_is_believed_in_again() -> None:
    rates = Rates()
    for _ in range(50):
        rates.note(2, [(2, 1)])
    doubtful = rates.expected(2).tokens
    for _ in range(400):
        rates.note(1, [(1, 1)])
    assert doubtful < 2.1
    assert rates.expected(2).tokens > 2.9
