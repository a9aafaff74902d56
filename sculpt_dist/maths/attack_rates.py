"""Rates of success of attacks, from what a classifier saw in every attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

Z95 = 1.959964  # quantile .975 of the normal distribution


@dataclass(frozen=True)
class Tried:
    """What came of one attack on one case: whether the concept was seen in each attempt, in their order."""

    seen: tuple[bool, ...]  # empty where the attack had nothing to do, as the plain image succeeded
    plain: bool  # whether it was seen in the plain image of the same prompt and seed
    passes: tuple[int, ...] = ()  # through the nets until each attempt
    variants: tuple[str, ...] = ()  # what each attempt is also counted by


def attack_rates(cases: Sequence[Tried], counts: str = "best") -> dict[str, float | int | list[float] | None]:
    """The rates of an attack over its cases, in [0, 1].

    pre: the share of cases that succeed plainly. post, with its 95 % interval: the share that succeed plainly or under
    attack, where the best counts; the share of all attempts, resampled case by case, where the mean counts. alone: of
    the cases attacked, those in which any attempt succeeded. mean: of all attempts, those that succeeded.
    passes_to_success: the median over successful attacks, None where none is.
    """
    attacked = [case for case in cases if case.seen]
    attempts = [seen for case in attacked for seen in case.seen]
    firsts = [case.passes[case.seen.index(True)] for case in attacked if any(case.seen) and case.passes]
    successes = sum(case.plain or any(case.seen) for case in cases)
    by_mean = counts == "mean"
    return {
        "cases": len(cases),
        "attacked": len(attacked),
        "pre": share(sum(case.plain for case in cases), len(cases)),
        "post": share(sum(attempts), len(attempts)) if by_mean else share(successes, len(cases)),
        "post_ci95": mean_interval(attacked) if by_mean else wilson_interval(successes, len(cases)),
        "alone": share(sum(any(case.seen) for case in attacked), len(attacked)),
        "mean": share(sum(attempts), len(attempts)),
        "passes_to_success": median(firsts) if firsts else None,
    }


def variant_rates(cases: Sequence[Tried]) -> dict[str, float]:
    """Variant -> the share of its attempts that succeeded, in the order in which they came."""
    found: dict[str, list[bool]] = {}
    for case in cases:
        for variant, seen in zip(case.variants, case.seen):
            if variant:
                found.setdefault(variant, []).append(seen)
    return {variant: sum(seen) / len(seen) for variant, seen in found.items()}


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def wilson_interval(successes: int, trials: int) -> list[float] | None:
    """The 95 % score interval of a share (Wilson, JASA 22, 1927); sound for few trials and for shares of 0 and 1."""
    if trials == 0:
        return None
    p, z2 = successes / trials, Z95**2
    middle, spread = p + z2 / (2 * trials), Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    low, high = ((middle + sign * spread) / (1 + z2 / trials) for sign in (-1, 1))
    return [max(0.0, low), min(1.0, high)]


def mean_interval(cases: Sequence[Tried], rounds: int = 2000) -> list[float] | None:
    """The 95 % percentile interval of the share of attempts that succeed, by resampling cases; None for one case."""
    if len(cases) < 2:
        return None
    right, among = (np.array([count(case.seen) for case in cases]) for count in (sum, len))
    drawn = np.random.default_rng(0).integers(0, len(cases), (rounds, len(cases)))
    low, high = np.percentile(right[drawn].sum(1) / among[drawn].sum(1), [2.5, 97.5])
    return [float(low), float(high)]


def pooled_rate(of_seeds: Sequence[Mapping[str, Any]]) -> tuple[float, list[float] | None] | None:
    """(rate, its 95 % interval) of an attack over several models, from what `attack_rates` gives for each.

    The interval takes all cases as independent; a rate that is a mean over attempts has none. None without a rate.
    """
    judged = [rates for rates in of_seeds if rates.get("post") is not None]
    if not judged:
        return None
    rate, cases = sum(rates["post"] for rates in judged) / len(judged), sum(rates["cases"] for rates in judged)
    is_share = all(rates["counts"] == "best" for rates in judged)
    return rate, wilson_interval(round(rate * cases), cases) if is_share else None


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number over those that have it."""
    names = dict.fromkeys(name for one in scores for name in one)
    columns = {name: [one[name] for one in scores if name in one] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}
