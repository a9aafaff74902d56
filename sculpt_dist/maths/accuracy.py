"""Unlearning scores as UnlearnCanvas defines them (arXiv 2402.11846), from requested and recognised classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Target:
    """A concept to forget: an index into the objects or the styles, and the other members of its superclass."""

    kind: str  # object or style
    index: int
    siblings: tuple[int, ...]  # object indices; empty for a style


@dataclass(frozen=True)
class Answers:
    """One entry per image, N images: what the prompt requests and what the classifier recognised; -1 means none."""

    prompt: np.ndarray  # [N] int, the prompt's number: the unit of the bootstrap
    object_asked: np.ndarray  # [N] int; -1 when the prompt names none of the scored objects (or styles)
    style_asked: np.ndarray  # [N] int
    object_seen: np.ndarray  # [N] int
    style_seen: np.ndarray | None  # [N] int; None when the classifier knows no styles


# score -> (right, among), [N] each: how often each image counts in the numerator and the denominator
Counts = Mapping[str, tuple[np.ndarray, np.ndarray]]


def unlearning_scores(
    answers: Answers, targets: Sequence[Target], weight: np.ndarray | None = None, held: Sequence[int] = ()
) -> dict[str, float | None]:
    """UA, IRA (also near, far and held), CRA, SA and CTA in [0, 1]; None for a score without images.

    `weight` [N] counts images several times. `held`: see `score_counts`.
    """
    weight = np.ones(len(answers.prompt)) if weight is None else weight
    counts = score_counts(answers, targets, held)
    return {name: _share(float(weight @ right), float(weight @ among)) for name, (right, among) in counts.items()}


def score_counts(answers: Answers, targets: Sequence[Target], held: Sequence[int] = ()) -> Counts:
    """What every image adds to each score; a score is the sum of `right` divided by the sum of `among`.

    UA: the share of target images in which the target is not recognised. IRA and CRA: over images without any target,
    the accuracy in the targets' own domain and in the other one. When both domains have targets, each is its own IRA,
    and CRA too is the mean of the two. IRA_near and IRA_far: the accuracy over the objects of a target's superclass,
    and over all other objects, where a target is an object with siblings; without those that training held. IRA_held:
    the same over these, the object indices `held`. SA: the share of target images recognised as another member of the
    superclass. CTA: the other domain's accuracy on target images.
    """
    num = len(answers.prompt)
    asked = {"object": answers.object_asked, "style": answers.style_asked}
    right = {"object": answers.object_seen == answers.object_asked}
    if answers.style_seen is not None:
        right["style"] = answers.style_seen == answers.style_asked
    names_one = {kind: indices >= 0 for kind, indices in asked.items()}  # whether the prompt names one of this kind
    other_domain = {"object": "style", "style": "object"}
    of_target = np.zeros(num, bool)
    forgotten, replaced, other = [], [], []
    for target in targets:
        of_this = asked[target.kind] == target.index
        of_target |= of_this
        if target.kind in right:
            forgotten.append((of_this, ~right[target.kind]))
        if target.siblings:
            replaced.append((of_this, np.isin(answers.object_seen, target.siblings)))
        if other_domain[target.kind] in right:
            other.append((of_this & names_one[other_domain[target.kind]], right[other_domain[target.kind]]))
    kinds = {target.kind for target in targets}
    own = [(~of_target & names_one[kind], right[kind]) for kind in right if kind in kinds]
    cross = [
        (~of_target & names_one[other_domain[kind]], right[other_domain[kind]])
        for kind in kinds
        if other_domain[kind] in right
    ]
    siblings = sorted({sibling for target in targets for sibling in target.siblings})
    is_near, is_held = (np.isin(asked["object"], indices) for indices in (siblings, list(held)))
    kept = ~of_target & names_one["object"]
    untouched = kept & ~is_held & bool(siblings)
    parts = {"near": untouched & is_near, "far": untouched & ~is_near, "held": kept & is_held}
    groups = {"UA": forgotten, "IRA": own} | {f"IRA_{name}": [(part, right["object"])] for name, part in parts.items()}
    groups |= {"CRA": cross, "SA": replaced, "CTA": other}
    return {name: _added(pairs, num) for name, pairs in groups.items()}


def bootstrap_intervals(
    answers: Answers, targets: Sequence[Target], rounds: int, seed: int = 0, held: Sequence[int] = ()
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals [low, high] of every score, by resampling prompts, each with all its images.

    None for a score that rests on a single prompt: it has no spread over prompts.
    """
    rng = np.random.default_rng(seed)
    prompts, counts = per_prompt(answers, score_counts(answers, targets, held))
    columns = np.stack([part for pair in counts.values() for part in pair], axis=1)  # [P, 2 scores], whole numbers
    sums = np.empty((rounds, columns.shape[1]))
    for round_ in range(rounds):  # one by one: a table of rounds x prompts would not fit into memory
        drawn = np.bincount(rng.integers(0, len(prompts), len(prompts)), minlength=len(prompts))
        sums[round_] = drawn @ columns
    pairs = zip(sums.T[::2], sums.T[1::2])
    return {
        name: interval(right, among) if (counts[name][1] > 0).sum() > 1 else None
        for name, (right, among) in zip(counts, pairs)
    }


def per_prompt(answers: Answers, counts: Counts) -> tuple[np.ndarray, Counts]:
    """(the prompts [P], the counts summed over the images of each, [P])."""
    prompts, inverse = np.unique(answers.prompt, return_inverse=True)

    def summed(part: np.ndarray) -> np.ndarray:
        return np.bincount(inverse, part, len(prompts))

    return prompts, {name: (summed(right), summed(among)) for name, (right, among) in counts.items()}


def accuracy_by(asked: np.ndarray, right: np.ndarray, names: Sequence[str]) -> Mapping[str, float]:
    """Accuracy of each name over the images that request it; names that none requests are left out."""
    return {name: float(right[asked == i].mean()) for i, name in enumerate(names) if (asked == i).any()}


def interval(right: np.ndarray, among: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile interval of the ratios right / among, [R] each; rounds without any image are left out."""
    counted = among > 0
    if not counted.any():
        return None
    low, high = np.percentile(right[counted] / among[counted], [2.5, 97.5])
    return float(low), float(high)


def _added(pairs: Sequence[tuple[np.ndarray, np.ndarray]], num: int) -> tuple[np.ndarray, np.ndarray]:
    """(right, among), [N] each, summed over pairs of (which images count, which are right)."""
    right, among = np.zeros(num), np.zeros(num)
    for counted, correct in pairs:
        right += counted & correct
        among += counted
    return right, among


def _share(right: float, among: float) -> float | None:
    return right / among if among else None
