"""A rank's memory, traffic and time, computed from counts of elements, bytes and operations.

The memory model follows the code of DeepSpeed 0.19.8 and is checked against measured peaks (docs/BENCHMARKS.md).
Elements are numbers of weights: E of N weights train, and each of k ranks steps a shard of s elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """The arrival of a gradient in the backward.

    `bytes` is the most memory allocated since the previous arrival, without gradients.
    """

    bytes: int
    arrived: int  # elements of the gradient


@dataclass(frozen=True)
class Rehearsed:
    """One forward and backward of one micro-batch."""

    forward: int  # the most bytes allocated until the loss was computed
    backward: tuple[Moment, ...]
    forward_flops: int
    backward_flops: int
    forwards: tuple[bool, ...]  # of the net, in order: whether with gradients
    viewed: (
        int  # elements of weights that autograd holds a view of until the backward, such as a linear layer's transpose
    )


@dataclass(frozen=True)
class Layout:
    """How a net is distributed over ranks."""

    parameters: int  # N
    trained: tuple[int, ...]  # elements of each trained tensor, E in all
    stage: int
    ranks: int
    width: int  # bytes per weight of the net: 2 or 4
    shard: int  # s
    sharded: int  # elements of the net on each rank; N in stages 0 to 2
    large: int = 0  # elements, and number, of the tensors that stage 3 gathers for each use
    large_tensors: int = 0

    @property
    def elements(self) -> int:
        return sum(self.trained)

    @property
    def part(self) -> int:
        """Elements of the gradients that this rank keeps in stages 1 and 2: whole tensors, the last one cut."""
        return min(self.elements, self.shard + max(self.trained)) if self.ranks > 1 else self.elements


@dataclass(frozen=True)
class Buckets:
    """DeepSpeed's limits, in elements. `whole`: a buffer occupies its full size at once, as on a GPU."""

    reduce: int
    prefetch: int
    live: int
    whole: bool


@dataclass(frozen=True)
class Kept:
    """What a rank keeps besides the net."""

    moments: float  # bytes per element of the shard: 8, or 8 * mask.keep when packed (open weights only)
    teachers: int  # frozen earlier states of the net: teacher, original, both or none
    loss_groups: int
    candidate: bool
    copies: bool  # a checkpoint is copied in memory while it is written
    embeddings: int  # bytes
    packed: bool = False
    pulled: bool = False  # towards a copy of the weights before the first concept


def resting(layout: Layout, kept: Kept) -> dict[str, float]:
    """Bytes on a rank between two steps, by part."""
    s, width = layout.shard, layout.width
    copied = (FP32 + FP32 + 1 + 2 * FP32) * s  # weights, saliency, mask, unpacked moments
    teacher = width * (s if layout.stage == 3 else layout.elements)
    return {
        "weights": width * layout.sharded,
        "master": FP32 * s if layout.stage else 0,  # a separate copy, even when the net is fp32
        "moments": kept.moments * s,
        "saliency": FP32 * s,
        "mask": s,
        "teacher": teacher * kept.teachers,
        # the shard before the concept, the best so far, and the one before the first concept
        "start": FP32 * s * (1 + kept.candidate + kept.pulled),
        "checkpoint copy": copied if kept.copies else 0,
        "embeddings": kept.embeddings,
    }


def peak(
    layout: Layout, kept: Kept, buckets: Buckets, steps: Sequence[Sequence[Rehearsed]], accumulate: int
) -> dict[str, float]:
    """Bytes on a rank at the moment of its peak, by part.

    `steps` has the loss groups of each kind of step (collecting, training).
    """
    unpacked = 2 * FP32 * layout.shard if kept.packed and not kept.copies else 0  # moments, unpacked to be saved
    fullest = _moment(0, 0, unpacked)
    for groups in steps:
        for number, rehearsed in enumerate(groups):
            combined = 0 < number == len(groups) - 1
            for moment in _moments(layout, buckets, rehearsed, accumulate, combined):
                moment["gradients"] += FP32 * layout.shard * number  # of earlier groups, until they are combined
                fullest = max(fullest, moment, key=lambda parts: sum(parts.values()))
    return resting(layout, kept) | fullest


def _moment(activations: float, gradients: float, buffers: float) -> dict[str, float]:
    return {"activations": float(activations), "gradients": float(gradients), "buffers": float(buffers)}


def _moments(
    layout: Layout, buckets: Buckets, rehearsed: Rehearsed, accumulate: int, combined: bool
) -> list[dict[str, float]]:
    """What a rank holds on top of `resting` at each moment of a step's last micro-batch."""
    held = _held_before(layout, accumulate)
    gathered = _gathered(layout, buckets, rehearsed.viewed)
    ahead = _bucket_kept(layout, buckets) + gathered
    found = [_moment(0, held, _bucket_kept(layout, buckets) + _first_gathered(layout, buckets))]
    found.append(_moment(rehearsed.forward, held, ahead))
    filling = reduced = 0  # elements in the bucket, and elements of this rank's part reduced so far
    for moment in rehearsed.backward:
        if layout.stage >= 2 and filling + moment.arrived > buckets.reduce:
            reducing = _filled(layout, buckets, filling) + _reducing(layout, filling)
            found.append(_moment(moment.bytes, held + _own(layout, reduced), ahead + reducing))
            reduced, filling = min(reduced + filling, layout.part), 0
        # With accumulation, earlier micro-batches have allocated the gradients already.
        waiting = filling * layout.width if layout.stage < 2 and accumulate == 1 else 0
        gradients = held + waiting + moment.arrived * layout.width + _own(layout, reduced)
        found.append(_moment(moment.bytes, gradients, ahead + _filled(layout, buckets, filling)))
        filling += moment.arrived
    found += _at_the_end(layout, buckets, filling, held, gathered)
    if combined:  # combining allocates two more
        found.append(_moment(0, held + 3 * FP32 * layout.shard, _bucket_kept(layout, buckets)))
    return found


def _held_before(layout: Layout, accumulate: int) -> float:
    """Bytes of gradients that are allocated when a micro-batch begins."""
    if layout.stage == 3:
        return FP32 * layout.shard  # allocated at the start
    if accumulate == 1 or (layout.stage == 2 and layout.width < FP32):  # a narrow net has one fp32 shard, see `_own`
        return 0
    if layout.stage == 2:
        return FP32 * layout.part
    return layout.width * layout.elements


def _own(layout: Layout, reduced: int) -> float:
    """Bytes of this rank's reduced gradients in stage 2: copies as they arrive, or one fp32 shard for a narrow net."""
    if layout.stage != 2:
        return 0
    return layout.width * reduced if layout.width == FP32 else FP32 * layout.shard


def _filled(layout: Layout, buckets: Buckets, elements: int) -> float:
    """Bytes of the bucket in which stage 2 collects gradients."""
    return layout.width * (buckets.reduce if buckets.whole else elements) if layout.stage == 2 else 0


def _bucket_kept(layout: Layout, buckets: Buckets) -> float:
    """Bytes of stage 3's bucket, which is never freed. On a CPU, memory counts once it is written to."""
    if layout.stage != 3:
        return 0
    return FP32 * (buckets.reduce if buckets.whole else min(layout.elements, buckets.reduce))


def _at_the_end(layout: Layout, buckets: Buckets, filling: int, held: float, gathered: float) -> list[dict[str, float]]:
    """The last reduction, then the optimizer's step on one flat gradient of its shard."""
    stage, width, elements, step = layout.stage, layout.width, layout.elements, FP32 * layout.shard
    gradients, narrow = width * elements, width < FP32
    if stage == 0:
        return [_moment(0, gradients, gradients)]  # all of them in one flat copy
    if stage == 3:
        bucket = _bucket_kept(layout, buckets)
        return [_moment(0, held, bucket + _reducing(layout, filling) + gathered), _moment(0, held + step, bucket)]
    if stage == 1:
        unused = width * max(0, buckets.reduce - elements) if buckets.whole else 0
        reducing = _reducing(layout, min(elements, buckets.reduce))
        found = [_moment(0, gradients, unused + reducing), _moment(0, gradients + width * layout.part, unused)]
    else:
        filled, own = _filled(layout, buckets, filling), _own(layout, min(elements - filling, layout.part))
        found = [_moment(0, held + own, filled + _reducing(layout, filling))]
        found += [] if narrow else [_moment(0, held + width * layout.part, filled)]
    found.append(_moment(0, step if narrow else width * layout.part + step, 0))
    if layout.ranks > 1 and not buckets.whole:
        found.append(_moment(0, 0, gradients))  # gloo gathers the weights into its own memory
    return found


def _reducing(layout: Layout, elements: int) -> float:
    """Bytes that reducing a bucket needs in addition: a flat copy, and one in fp32 for a narrower net."""
    if layout.stage == 3:
        return FP32 * elements
    narrow = layout.width < FP32
    return elements * ((layout.width if layout.ranks > 1 or narrow else 0) + (FP32 if narrow else 0))


def _gathered(layout: Layout, buckets: Buckets, viewed: int) -> float:
    """Bytes of gathered weights in stage 3 while activations are there.

    They stay up to the limit, and beyond it those that autograd holds a view of until the backward. Prefetched weights
    exist twice: any where not all of them stay, else only those that train, which are gathered again after a change.
    """
    if layout.stage < 3 or layout.ranks == 1:
        return 0
    moving = layout.elements if layout.parameters <= buckets.live else layout.parameters
    return layout.width * (min(layout.parameters, buckets.live + viewed) + min(moving, buckets.prefetch))


def _first_gathered(layout: Layout, buckets: Buckets) -> float:
    """Bytes at the start of a step's first forward, before there are activations: all that stays, much of it twice."""
    if layout.stage < 3 or layout.ranks == 1:
        return 0
    return layout.width * (min(layout.parameters, buckets.live) + min(layout.parameters, buckets.prefetch))


@dataclass(frozen=True)
class Traffic:
    """A step's payload, each whole tensor counted once, and the bytes that cross each rank's link."""

    payload: dict[str, float]  # of gradients and of weights
    wire: dict[str, float]  # by kind of collective: sum, gather, scatter
    collectives: int


def traffic(layout: Layout, buckets: Buckets, forwards: int, accumulate: int, groups: int) -> Traffic:
    """What a training step with `forwards` forwards of the net and `groups` loss groups sends; nothing on one rank.

    With ring algorithms an all-reduce crosses each link 2 (k - 1) / k times, a gather or scatter (k - 1) / k times.
    """
    k, width, elements = layout.ranks, layout.width, layout.elements
    if k == 1:
        return Traffic({}, {}, 0)
    backwards = groups * (accumulate if layout.stage >= 2 else 1)
    part = (k - 1) / k
    gradients = float(backwards * elements * (FP32 if layout.stage else width))
    small = 2  # the gradient's norm, and all that the step measured
    if layout.stage == 3:
        fits = layout.parameters <= buckets.live
        gathers = accumulate * forwards
        again = gathers + accumulate * groups  # otherwise in every forward and backward, except what is still gathered
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
    # DeepSpeed gathers after every optimizer step, even one that only captures a gradient.
    weights = float(groups * width * elements) if layout.stage else 0.0
    sums = backwards * -(-elements // buckets.reduce)
    wire = {"sum": 2 * part * gradients, "gather": part * weights}
    return Traffic({"gradients": gradients, "weights": weights}, wire, sums + groups * (layout.stage > 0) + small)


@dataclass(frozen=True)
class Rates:
    """A machine's speed."""

    flops: float  # operations per second of a rank
    bandwidth: Mapping[str, float]  # bytes per second of a rank's link, by kind of collective
    latency: float  # seconds per hop of a collective
    update: float = 0.0  # seconds to update one weight
    sampling: float | None = None  # operations per second of a rank that draws; None: as when it trains
    disk: float = 0.45e9  # bytes per second that a rank reads or writes, with the checksum
    copy: float = 2.6e9  # bytes per second at which a rank copies its state before a checkpoint
    store: float = 2e-5  # seconds that the ranks' store takes for one rank's message
    start: float = 8.0  # seconds of a rank's imports


def step_seconds(flops: float, layout: Layout, sent: Traffic, rates: Rates) -> dict[str, float]:
    """Seconds of a step, by part, without any overlap. A collective waits log2 k times for its latency."""
    waits = sent.collectives * math.ceil(math.log2(layout.ranks)) * rates.latency
    return {
        "arithmetic": flops / rates.flops,
        "update": layout.shard * rates.update,
        "communication": sum(size / rates.bandwidth[kind] for kind, size in sent.wire.items()) + waits,
    }
