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
        times.note(4, 9.0)  # the first one is dropped
        times.note(4, 0.02)
    assert dear.line().at(8) == pytest.approx(0.04)
    assert cheap.line().at(8) == pytest.approx(0.022)


def test_a_size_that_was_met_once_does_not_bend_the_line() -> None:
    times = Times(growth=1.0)
    for size in (1, 2):
        for _ in range(3):
            times.note(size, 0.01 * size)
    times.note(3, 5.0)
    assert times.line().at(3) == pytest.approx(0.03)


def test_a_line_never_falls() -> None:
    times = Times(growth=1.0)
    for _ in range(3):
        times.note(1, 0.02)
        times.note(8, 0.01)
    assert times.line().slope == 0


def test_expected_tokens_and_width_are_those_that_were_seen() -> None:
    rates = Rates()
    for _ in range(400):
        rates.note(4, [(2, 1), (4, 4)])
    tokens, width = rates.survival(4)[4]
    assert width == pytest.approx(4, abs=0.05)
    assert tokens == pytest.approx(1 + 2.5, abs=0.2)


def test_a_new_text_begins_with_what_is_usual_and_soon_goes_its_own_way() -> None:
    rates = Rates()
    for _ in range(300):
        rates.note(2, [(2, 0)])
    rates.begin()
    assert rates.survival(1)[1].tokens < 1.05
    for _ in range(6):
        rates.note(2, [(2, 2)])
    assert rates.survival(1)[1].tokens > 1.6


def test_the_first_measurement_of_a_size_is_dropped_and_old_ones_expire() -> None:
    times = Times(growth=0.1)
    times.note(3, 5.0)
    assert not times
    times.note(3, 0.01)
    assert times.at(3) == 0.01
    for _ in range(200):
        times.note(1, 0.002)
    assert 3 not in times.medians()


def test_what_was_learned_earlier_does_not_spare_the_first_measurement_from_being_dropped() -> None:
    times = Times(growth=0.1)
    times.learn(3, 0.01)
    assert times.at(3) == 0.01
    times.note(3, 5.0)
    assert times.at(3) == 0.01
    times.note(3, 0.02)
    assert times.at(3) == pytest.approx(0.015)
