"""Scores over several seeds, bootstrapped over seeds and prompts. Letters: S seeds, P prompts, R bootstrap rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sculpt_dist.maths.accuracy import Counts

HARMONIC = ("UA", "IRA", "CRA")  # H is the harmonic mean of these
ROBUST = (*HARMONIC, "1 - ASR")  # H4 is that of these, where ASR is the mean rate of the attacks of a row


def stacked(of_seeds: Sequence[Counts]) -> Counts:
    """Stack every seed's counts per prompt, [P] each, to [S, P]."""

    def stack(name: str, part: int) -> np.ndarray:
        return np.stack([counts[name][part] for counts in of_seeds])

    return {name: (stack(name, 0), stack(name, 1)) for name in of_seeds[0]}


def resampling(num_seeds: int, num_prompts: int, rounds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each round counts each seed [R, S] and each prompt [R, P], drawn independently with replacement."""
    rng = np.random.default_rng(seed)

    def drawn(num: int) -> np.ndarray:
        return np.stack([np.bincount(rng.integers(0, num, num), minlength=num) for _ in range(rounds)])

    return drawn(num_seeds), drawn(num_prompts)


def score_means(counts: Counts) -> dict[str, float]:
    """Every score over all seeds and prompts, and H; scores without any counted image are left out."""
    once = np.ones((1, next(iter(counts.values()))[0].shape[0])), np.ones((1, next(iter(counts.values()))[0].shape[1]))
    return {name: float(values[0]) for name, values in resampled_scores(counts, once).items() if np.isfinite(values[0])}


def resampled_scores(counts: Counts, weights: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score, and H of the measured ones, in every round, [R]; NaN where no image counts."""
    found: dict[str, np.ndarray] = {}
    for name, (right, among) in counts.items():
        hits, total = (np.einsum("rs,sp,rp->r", weights[0], part, weights[1], optimize=True) for part in (right, among))
        found[name] = np.divide(hits, total, out=np.full(len(hits), np.nan), where=total > 0)
    measured = [found[name] for name in HARMONIC if counts[name][1].any()]
    found["H"] = harmonic_mean(measured) if measured else np.full(len(weights[0]), np.nan)
    return found


def harmonic_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """The harmonic mean of numbers in [0, 1], [R] each; 0 where one of them is 0, NaN where one is NaN."""
    table = np.stack(values)  # [3, R]
    safe = np.where(table > 0, table, 1.0)
    return np.where(np.isnan(table).any(0), np.nan, np.where((table > 0).all(0), len(table) / (1 / safe).sum(0), 0.0))


def harmonic(scores: Mapping[str, float | None], names: Sequence[str] = HARMONIC) -> float | None:
    """The harmonic mean of the measured scores: a classifier without styles gives no CRA. None if none is measured."""
    found = [np.array([score]) for name in names if (score := scores.get(name)) is not None]
    return float(harmonic_mean(found)[0]) if found else None


def percentiles(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the rounds [R]; None when every round is NaN."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
