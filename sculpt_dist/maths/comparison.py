"""Scores over several seeds, with intervals over seeds and prompts together. Letters: S seeds, P prompts, R rounds of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sculpt_dist.maths.scores import Counts

HARMONIC = ("UA", "IRA", "CRA")  # what the harmonic mean H is of


def stacked(of_seeds: Sequence[Counts]) -> Counts:
    """The counts per prompt of every seed, [P] each, as [S, P]."""
    return {
        name: tuple(np.stack([counts[name][part] for counts in of_seeds]) for part in (0, 1)) for name in of_seeds[0]
    }


def resampling(num_seeds: int, num_prompts: int, rounds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed [R, S] and each prompt [R, P] counts in every round, both drawn with replacement and apart from each other."""
    rng = np.random.default_rng(seed)

    def drawn(num: int) -> np.ndarray:
        return np.stack([np.bincount(rng.integers(0, num, num), minlength=num) for _ in range(rounds)])

    return drawn(num_seeds), drawn(num_prompts)


def score_means(counts: Counts) -> dict[str, float]:
    """Every score over all seeds and prompts, and H; without those that nothing counts for."""
    once = np.ones((1, next(iter(counts.values()))[0].shape[0])), np.ones((1, next(iter(counts.values()))[0].shape[1]))
    return {name: float(values[0]) for name, values in resampled_scores(counts, once).items() if np.isfinite(values[0])}


def resampled_scores(counts: Counts, weights: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score, and H of those that are measured, in every round, [R]; not a number where nothing counts."""
    found: dict[str, np.ndarray] = {}
    for name, (right, among) in counts.items():
        hits, total = (np.einsum("rs,sp,rp->r", weights[0], part, weights[1], optimize=True) for part in (right, among))
        found[name] = np.divide(hits, total, out=np.full(len(hits), np.nan), where=total > 0)
    measured = [found[name] for name in HARMONIC if counts[name][1].any()]
    found["H"] = harmonic_mean(measured) if measured else np.full(len(weights[0]), np.nan)
    return found


def harmonic_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Of numbers in [0, 1], [R] each; 0 where one of them is."""
    table = np.stack(values)  # [3, R]
    safe = np.where(table > 0, table, 1.0)
    return np.where(np.isnan(table).any(0), np.nan, np.where((table > 0).all(0), len(table) / (1 / safe).sum(0), 0.0))


def harmonic(scores: Mapping[str, float | None], names: Sequence[str] = HARMONIC) -> float | None:
    """Of those that are measured: a classifier that knows no styles gives no CRA. None where none is."""
    found = [np.array([score]) for name in names if (score := scores.get(name)) is not None]
    return float(harmonic_mean(found)[0]) if found else None


def percentiles(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the rounds [R]; None where no round has a number."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
