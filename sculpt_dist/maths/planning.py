"""What a rank of a run holds, sends and waits for, from counts alone: elements, bytes, operations.

The account of memory is that of DeepSpeed 0.19.8, read in its code and held against measured peaks (docs/BENCHMARKS.md). Elements are
numbers of weights; `E` trains of `N` in all, and each of `k` ranks steps a shard of `s` elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """Until a gradient of `arrived` elements came, at most so many bytes lived since the one before, gradients left out."""

    bytes: int
    arrived: int


@dataclass(frozen=True)
class Rehearsed:
    """One forward and backward of one micro-batch."""

    forward: int  # the most bytes that lived until the loss was there
    backward: tuple[Moment, ...]
    forward_flops: int
    backward_flops: int
    forwards: tuple[bool, ...]  # of the net, in order: whether it took gradients
    viewed: int  # elements of weights of which the backward keeps a view, as a linear layer does of its transpose


@dataclass(frozen=True)
class Layout:
    """How a net is laid over ranks."""

    parameters: int  # N
    trained: tuple[int, ...]  # elements of each tensor that trains, E in all
    stage: int
    ranks: int
    width: int  # bytes of a weight of the net: 2 or 4
    shard: int  # s
    sharded: int  # elements of the net that a rank keeps, N in stages 0 to 2
    large: int = 0  # elements of the tensors that stage 3 gathers anew each time, and their number
    large_tensors: int = 0

    @property
    def elements(self) -> int:
        return sum(self.trained)

    @property
    def part(self) -> int:
        """Elements of the gradients that this rank keeps in stages 1 and 2: those of whole tensors, cut at the last one."""
        return min(self.elements, self.shard + max(self.trained)) if self.ranks > 1 else self.elements


@dataclass(frozen=True)
class Buckets:
    """Limits in elements, as DeepSpeed is told them; `whole`: a buffer takes its full size at once, as on a GPU."""

    reduce: int
    prefetch: int
    live: int
    whole: bool


@dataclass(frozen=True)
class Kept:
    """What is held beside the net."""

    moments: float  # bytes per element of the shard: 8, or 8 keep where they are packed: for open weights only
    teachers: int  # frozen earlier states: 1, or 2 with the original
    loss_groups: int
    candidate: bool
    copies: bool  # a checkpoint's copy is in memory while it is written
    embeddings: int  # bytes
    packed: bool = False


def resting(layout: Layout, kept: Kept) -> dict[str, float]:
    """Bytes of a rank between two steps, by part."""
    s, width = layout.shard, layout.width
    copied = (FP32 + FP32 + 1 + 2 * FP32) * s  # weights, saliency, mask, moments unpacked
    teacher = width * (s if layout.stage == 3 else layout.elements)
    return {
        "weights": width * layout.sharded,
        "master": FP32 * s if layout.stage else 0,  # DeepSpeed keeps one apart even where the net itself is fp32
        "moments": kept.moments * s,
        "saliency": FP32 * s,
        "mask": s,
        "teacher": teacher * kept.teachers,
        "start": FP32 * s * (1 + kept.candidate),  # the shard as it was before the concept, and the best one so far
        "checkpoint copy": copied if kept.copies else 0,
        "embeddings": kept.embeddings,
    }


def peak(
    layout: Layout, kept: Kept, buckets: Buckets, steps: Sequence[Sequence[Rehearsed]], accumulate: int
) -> dict[str, float]:
    """Bytes of a rank at the fullest moment, by part. `steps`: for each kind of step (collecting, training) its loss groups."""
    still = resting(layout, kept)
    fullest = _moment(
        0, 0, 2 * FP32 * layout.shard if kept.packed and not kept.copies else 0
    )  # moments unpacked, to be saved
    for groups in steps:
        for number, rehearsed in enumerate(groups):
            for moment in _moments(
                layout, buckets, rehearsed, accumulate, combined=number and number == len(groups) - 1
            ):
                moment["gradients"] += (
                    FP32 * layout.shard * number
                )  # those of the groups before, which wait to be combined
                fullest = max(fullest, moment, key=lambda parts: sum(parts.values()))
    return still | fullest


def _moment(activations: float, gradients: float, buffers: float) -> dict[str, float]:
    return {"activations": float(activations), "gradients": float(gradients), "buffers": float(buffers)}


def _moments(
    layout: Layout, buckets: Buckets, rehearsed: Rehearsed, accumulate: int, combined: bool
) -> list[dict[str, float]]:
    """What lives beside the resting part at each moment of the last micro-batch of a step."""
    held = _held_before(layout, accumulate)
    gathered = _gathered(layout, buckets, rehearsed.viewed)
    ahead = _bucket_kept(layout, buckets) + gathered
    found = [_moment(rehearsed.forward, held, ahead)]
    filling = reduced = 0  # elements in the bucket, and of this rank's part that left it
    for moment in rehearsed.backward:
        if layout.stage >= 2 and filling + moment.arrived > buckets.reduce:
            reducing = _filled(layout, buckets, filling) + _reducing(layout, filling)
            found.append(_moment(moment.bytes, held + _own(layout, reduced), ahead + reducing))
            reduced, filling = min(reduced + filling, layout.part), 0
        lying = (
            filling * layout.width if layout.stage < 2 and accumulate == 1 else 0
        )  # earlier micro-batches left room for them else
        arriving = moment.arrived * layout.width
        found.append(
            _moment(
                moment.bytes, held + lying + arriving + _own(layout, reduced), ahead + _filled(layout, buckets, filling)
            )
        )
        filling += moment.arrived
    found += _at_the_end(layout, buckets, filling, held, gathered)
    if combined:  # the rule makes two more
        found.append(_moment(0, held + 3 * FP32 * layout.shard, _bucket_kept(layout, buckets)))
    return found


def _held_before(layout: Layout, accumulate: int) -> float:
    """Bytes of gradients when a micro-batch begins."""
    if layout.stage == 3:
        return FP32 * layout.shard  # there from the start
    if accumulate == 1 or (layout.stage == 2 and layout.width < FP32):  # there one shard takes all of them, see `_own`
        return 0
    if layout.stage == 2:
        return FP32 * layout.part
    return layout.width * layout.elements


def _own(layout: Layout, reduced: int) -> float:
    """Bytes of this rank's part of the sums, stage 2: a copy as they come, or one fp32 shard where the net is narrower."""
    if layout.stage != 2:
        return 0
    return layout.width * reduced if layout.width == FP32 else FP32 * layout.shard


def _filled(layout: Layout, buckets: Buckets, elements: int) -> float:
    """Bytes of the bucket in which stage 2 collects gradients."""
    return layout.width * (buckets.reduce if buckets.whole else elements) if layout.stage == 2 else 0


def _bucket_kept(layout: Layout, buckets: Buckets) -> float:
    """Bytes of stage 3's bucket, which stays; memory that nobody has written to is none on a CPU."""
    return (
        FP32 * (buckets.reduce if buckets.whole else min(layout.elements, buckets.reduce)) if layout.stage == 3 else 0
    )


def _at_the_end(layout: Layout, buckets: Buckets, filling: int, held: float, gathered: float) -> list[dict[str, float]]:
    """The last reduction, and the optimizer's step with the gradient of its shard in one piece."""
    stage, width, elements, step = layout.stage, layout.width, layout.elements, FP32 * layout.shard
    lying, narrow = width * elements, width < FP32
    if stage == 0:
        return [_moment(0, lying, lying)]  # all of them in one flat copy
    if stage == 3:
        bucket = _bucket_kept(layout, buckets)
        return [_moment(0, held, bucket + _reducing(layout, filling) + gathered), _moment(0, held + step, bucket)]
    if stage == 1:
        unused = width * max(0, buckets.reduce - elements) if buckets.whole else 0
        reducing = _reducing(layout, min(elements, buckets.reduce))
        found = [_moment(0, lying, unused + reducing), _moment(0, lying + width * layout.part, unused)]
    else:
        filled, own = _filled(layout, buckets, filling), _own(layout, min(elements - filling, layout.part))
        found = [_moment(0, held + own, filled + _reducing(layout, filling))]
        found += [] if narrow else [_moment(0, held + width * layout.part, filled)]
    found.append(_moment(0, step if narrow else width * layout.part + step, 0))
    if layout.ranks > 1 and not buckets.whole:
        found.append(_moment(0, 0, lying))  # gloo gathers the weights into memory of its own
    return found


def _reducing(layout: Layout, elements: int) -> float:
    """Bytes that reducing a bucket takes beside it: a flat copy of its slices, and one in fp32 where the net is narrower."""
    if layout.stage == 3:
        return FP32 * elements
    narrow = layout.width < FP32
    return elements * ((layout.width if layout.ranks > 1 or narrow else 0) + (FP32 if narrow else 0))


def _gathered(layout: Layout, buckets: Buckets, viewed: int) -> float:
    """Bytes of gathered weights in stage 3: they stay up to the limit, beyond it where a backward keeps a view of them, and what is
    fetched ahead is there twice."""
    if layout.stage < 3 or layout.ranks == 1:
        return 0
    return layout.width * (min(layout.parameters, buckets.live + viewed) + min(layout.parameters, buckets.prefetch))


@dataclass(frozen=True)
class Traffic:
    """Payload of a step, whole tensors counted once, and what of it crosses each rank's link."""

    payload: dict[str, float]  # of gradients and of weights
    wire: dict[str, float]  # by kind of collective: sum, gather, scatter
    collectives: int


def traffic(layout: Layout, buckets: Buckets, forwards: int, accumulate: int, groups: int) -> Traffic:
    """What a training step with so many forwards of the net and loss groups sends; nothing on one rank.

    Rings: a sum crosses each link 2 (k - 1) / k times, a gathering or scattering (k - 1) / k times.
    """
    k, width, elements = layout.ranks, layout.width, layout.elements
    if k == 1:
        return Traffic({}, {}, 0)
    backwards = groups * (accumulate if layout.stage >= 2 else 1)
    part = (k - 1) / k
    gradients = float(backwards * elements * (FP32 if layout.stage else width))
    small = 4 + groups * accumulate
    if layout.stage == 3:
        fits = layout.parameters <= buckets.live
        gathers = accumulate * forwards
        again = gathers + accumulate * groups  # else in every forward and every backward, but for what is still there
        gathered = (
            layout.large + (gathers - 1) * elements
            if fits
            else again * layout.large - (again - 1) * min(buckets.live, layout.large)
        )
        passes = layout.large_tensors + (gathers - 1) * len(layout.trained) if fits else again * layout.large_tensors
        weights = float(width * gathered)
        wire = {"scatter": part * gradients, "gather": part * weights}
        return Traffic(
            {"gradients": gradients, "weights": weights},
            wire,
            passes + backwards * -(-elements // buckets.reduce) + small,
        )
    weights = (
        float(groups * width * elements) if layout.stage else 0.0
    )  # DeepSpeed gathers after every step, those that only capture too
    sums = backwards * -(-elements // buckets.reduce)
    wire = {"sum": 2 * part * gradients, "gather": part * weights}
    return Traffic({"gradients": gradients, "weights": weights}, wire, sums + groups * (layout.stage > 0) + small)


@dataclass(frozen=True)
class Rates:
    """What a machine does: operations per second of a rank, bytes per second of its link, seconds of a collective, of a weight's update."""

    flops: float
    bandwidth: Mapping[str, float]  # by kind of collective
    latency: float
    update: float = 0.0


def step_seconds(flops: float, layout: Layout, sent: Traffic, rates: Rates) -> dict[str, float]:
    """Seconds of a step, by part; nothing is taken to overlap. A collective waits log2 k times for its latency."""
    waits = sent.collectives * math.ceil(math.log2(layout.ranks)) * rates.latency
    return {
        "arithmetic": flops / rates.flops,
        "update": layout.shard * rates.update,
        "communication": sum(size / rates.bandwidth[kind] for kind, size in sent.wire.items()) + waits,
    }
