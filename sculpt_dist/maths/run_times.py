"""The seconds of a whole run on n ranks, part by part, from counts of its work and rates of a machine.

[x] is x rounded up, hops = [log2 n], and a small collective takes latency * hops.

    start        imports + 2 files / disk + prompts * F_prompt / rate
                 Every rank imports and reads the model. Rank 0 alone takes its checksum and embeds the prompts.
    drawing      [batches / n] * (F_batch / sampling rate + forwards * gathered + 3 small + n * store)
                 One queue over all concepts and sources: more ranks than batches do not help.
    scoring      stages * [batches / n] * (F_batch / sampling rate + forwards * gathered + small)
                 The same for the images of a stage, whole or (`evaluate.subset`) in part; F_batch has the decoding.
    training     concepts * (collect * step_c + updates * step_u), each step on k ranks as `planning.step_seconds`
                 k <= n is the most ranks over which the global batch divides: a rank has at least one sample.
    checkpoints  concepts * ([training / every] within, and one at the end), each
                 copied / copy + max(0, written / disk + n * store - hidden), or without a copy written / disk
                 written = 21 bytes per weight of a rank's shard. `hidden`: until the next save, or while scoring.
    export       2 files / disk + 2 (n - 1) / n * 4 E / sum bandwidth + matrices * latency * hops
                 Rank 0 writes the whole model and takes its checksums; the trained matrices are summed one by one.

`gathered` is what stage 3 gathers for a forward without gradient, 0 below: (n - 1) / n * width * (large - live) /
gather bandwidth + tensors * latency * hops. Nothing overlaps, and all ranks are equally fast. Images that a method
draws while it trains, classifiers and metrics, data loading and turnovers of the mask are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sculpt_dist.maths.planning import FP32, Buckets, Layout, Rates, Rehearsed, step_seconds, traffic

SAVED = 4 * FP32 + 1 + FP32  # bytes per weight: itself, saliency, two moments; whether it is open; before the concept


@dataclass(frozen=True)
class Sampling:
    """Batches of images to draw, which the ranks share."""

    batches: int
    flops: float  # of a batch
    forwards: int  # of the net for a batch, for which stage 3 gathers it; 0 where it is gathered once for all
    times: int = 1  # that all of them are drawn


@dataclass(frozen=True)
class Training:
    """One kind of training step (collecting, or updating): how many of it a concept has, and its loss groups."""

    steps: int
    sample_flops: float
    groups: tuple[Rehearsed, ...]


@dataclass(frozen=True)
class Work:
    """What a whole run does, on any number of ranks."""

    concepts: int
    prompts: int
    prompt_flops: float
    drawing: Sampling
    scoring: tuple[Sampling, ...]  # of the base and the last stage, and of those in between
    training: tuple[Training, ...]
    batch: int
    accumulate: int
    files: int  # bytes of the model's weights
    every: float  # seconds between checkpoints; 0: only at the end of a concept
    background: bool


def run_seconds(
    work: Work, layout: Callable[[int], Layout], buckets: Buckets, rates: Rates, ranks: int, training_ranks: int
) -> dict[str, float]:
    """Seconds of each part; `layout` gives the net's on a number of ranks, and training uses `training_ranks`."""
    whole, trained = layout(ranks), layout(training_ranks)
    hops = _hops(ranks)
    scoring = sum(_sampling(drawn, whole, buckets, rates, rates.latency * hops) for drawn in work.scoring)
    of_concept = sum(_training(kind, trained, buckets, rates, work) for kind in work.training)
    after = scoring * (1 - 1 / max(1, sum(drawn.times for drawn in work.scoring)))  # all but the base's, about
    summed = 2 * (ranks - 1) / ranks * FP32 * whole.elements / rates.bandwidth["sum"]
    return {
        "start": rates.start + 2 * work.files / rates.disk + work.prompts * work.prompt_flops / rates.flops,
        "drawing": _sampling(work.drawing, whole, buckets, rates, 3 * rates.latency * hops + ranks * rates.store),
        "training": work.concepts * of_concept,
        "checkpoints": work.concepts * _checkpoints(work, trained, rates, of_concept, after / work.concepts),
        "scoring": scoring,
        "export": 2 * work.files / rates.disk + summed + len(whole.trained) * rates.latency * hops,
    }


def _hops(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def _sampling(sampling: Sampling, layout: Layout, buckets: Buckets, rates: Rates, coordinating: float) -> float:
    """The seconds of all rounds; in each, every rank draws a batch or waits."""
    rounds = math.ceil(sampling.batches / layout.ranks)
    drawing = sampling.flops / (rates.sampling or rates.flops)
    return sampling.times * rounds * (drawing + sampling.forwards * _gathering(layout, buckets, rates) + coordinating)


def _gathering(layout: Layout, buckets: Buckets, rates: Rates) -> float:
    """Seconds in which stage 3 gathers what a forward needs and did not stay from the one before."""
    if layout.stage < 3 or layout.ranks == 1 or layout.parameters <= buckets.live:
        return 0.0
    moved = (layout.ranks - 1) / layout.ranks * layout.width * max(0, layout.large - buckets.live)
    return moved / rates.bandwidth["gather"] + layout.large_tensors * rates.latency * _hops(layout.ranks)


def _training(kind: Training, layout: Layout, buckets: Buckets, rates: Rates, work: Work) -> float:
    """Seconds of a concept's steps of this kind."""
    forwards = sum(len(group.forwards) for group in kind.groups)
    sent = traffic(layout, buckets, forwards, work.accumulate, len(kind.groups))
    flops = kind.sample_flops * work.batch / layout.ranks
    return kind.steps * sum(step_seconds(flops, layout, sent, rates).values())


def _checkpoints(work: Work, layout: Layout, rates: Rates, training: float, scoring: float) -> float:
    """Seconds of a concept in which training waits for its checkpoints."""
    size = SAVED * layout.shard
    written = size / rates.disk + layout.ranks * rates.store

    def waits(hidden: float) -> float:
        return size / rates.copy + max(0.0, written - hidden) if work.background else written

    within = int(training / work.every) if work.every else 0
    return within * waits(work.every) + waits(scoring)
