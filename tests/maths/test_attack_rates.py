"""Rates of attacks by hand, and their intervals against a published one."""

from __future__ import annotations

import pytest

from sculpt_dist.maths.attack_rates import (
    Tried,
    attack_rates,
    mean_interval,
    mean_scores,
    variant_rates,
    wilson_interval,
)

CASES = [
    Tried((), plain=True),  # nothing was left to attack
    Tried((False, True, True), plain=False, passes=(10, 20, 30), variants=("a", "b", "b")),
    Tried((False, False, False), plain=False, passes=(10, 20, 30), variants=("a", "b", "b")),
    Tried((True, False, False), plain=False, passes=(40, 50, 60), variants=("a", "b", "b")),
]


def test_the_rates_of_four_cases_by_hand():
    rates = attack_rates(CASES)
    assert (rates["cases"], rates["attacked"], rates["pre"], rates["post"]) == (4, 3, 1 / 4, 3 / 4)
    assert (rates["alone"], rates["mean"], rates["passes_to_success"]) == (2 / 3, 3 / 9, 30)  # the median of 20 and 40
    assert rates["post_ci95"] == wilson_interval(3, 4)
    assert variant_rates(CASES) == {"a": 1 / 3, "b": 2 / 6}


def test_where_the_mean_counts_the_rate_is_that_of_all_attempts():
    rates = attack_rates(CASES, "mean")
    assert (rates["post"], rates["alone"]) == (3 / 9, 2 / 3)
    low, high = rates["post_ci95"]
    assert 0 <= low < 1 / 3 < high <= 2 / 3
    assert mean_interval(CASES[1:2]) is None and mean_interval([CASES[2]] * 3) == [0.0, 0.0]


def test_nothing_attacked_has_no_rate():
    rates = attack_rates([])
    assert {rates[name] for name in ("pre", "post", "alone", "mean", "post_ci95", "passes_to_success")} == {None}


def test_the_interval_of_wilson():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx([0.0, 0.1611], abs=5e-5)


def test_a_mean_is_over_those_that_have_the_number():
    assert mean_scores([{"a": 1.0}, {"a": 3.0, "b": 5.0}, {}]) == {"a": 2.0, "b": 5.0}
