"""What a run would need: memory of a rank, traffic and time of a step, and the cheapest change that makes it fit.

Planning needs neither weights nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sculpt_dist.config.schema import EngineConfig, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.masking import payload_bytes
from sculpt_dist.engine.zero import REDUCE_BUCKET, fetched_ahead
from sculpt_dist.maths.planning import Buckets, Rates, peak, resting, step_seconds, traffic
from sculpt_dist.planning.subject import Drawing, Subject
from sculpt_dist.planning.variant import RANKS, Change, Variant
from sculpt_dist.planning.whole_run import plan_whole_run
from sculpt_dist.run.setup import resolve

GIGA = 1e9


class Planner:
    """Plans one configuration and its variants; each model and micro-batch is rehearsed once."""

    def __init__(self, device: str) -> None:
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device}: choose cpu or cuda")
        self.whole = device == "cuda"
        self._subjects: dict[tuple[str, int, bool], Subject] = {}
        self._drawn: dict[tuple[str, int], Drawing] = {}

    def subject(self, variant: Variant) -> Subject:
        engine = variant.config.engine
        key = (engine.precision, resolve(variant.config).micro_batch(variant.ranks), engine.checkpointing)
        if key not in self._subjects:
            self._subjects[key] = Subject(variant.config, variant.ranks)
        return self._subjects[key]

    def buckets(self, engine: EngineConfig) -> Buckets:
        return Buckets(REDUCE_BUCKET, fetched_ahead(engine.gathered), int(engine.gathered), self.whole)

    def memory(self, variant: Variant, subject: Subject | None = None) -> dict[str, float]:
        """Bytes of a rank by part at the fullest moment of a step; and `drawing`, a different moment.

        `subject`: the micro-batch to count; by default the variant's own.
        """
        config, subject = variant.config, subject or self.subject(variant)
        layout, kept = subject.layout(config.engine.stage, config.engine.precision, variant.ranks), subject.kept(config)
        parts = peak(layout, kept, self.buckets(config.engine), subject.steps, config.train.accumulate)
        at_rest = resting(layout, kept)
        base = sum(at_rest.values()) if config.evaluate.enabled or config.engine.stage == 3 else at_rest["weights"]
        batch = _drawn_at_once(config, subject)
        return parts | {"drawing": base + self.drawing(config.engine.precision, subject, batch).bytes if batch else 0.0}

    def fullest(self, variant: Variant) -> int:
        """The most bytes that a rank holds at any moment."""
        parts = self.memory(variant)
        drawing = parts.pop("drawing")
        return round(max(sum(parts.values()), drawing))

    def drawing(self, precision: str, subject: Subject, batch: int) -> Drawing:
        """What it takes to draw a batch of images, counted once."""
        if (precision, batch) not in self._drawn:
            self._drawn[precision, batch] = subject.drawing(batch)
        return self._drawn[precision, batch]


def plan_run(
    config: RunConfig, ranks: int, memory: float, rates: Rates | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """What each of `ranks` ranks with `memory` bytes would hold and send; with `rates` also the time of a step.

    `run` is about the whole run, on these and on 8 to 1,024 ranks (see `whole_run`).
    Only tensors are counted: no workspace of kernels, no CUDA context, no fragmentation of the allocator.
    Raises ConfigError and ModelError, as `check.check_run`, and ConfigError where nothing trains.
    """
    if not memory > 0:
        raise ConfigError(f"--memory {memory / GIGA:g}: must be more than 0 GB")
    planner, variant = Planner(device), Variant(config, ranks)
    subject = planner.subject(variant)
    engine, accumulate = config.engine, config.train.accumulate
    parts = planner.memory(variant)
    layout = subject.layout(engine.stage, engine.precision, ranks)
    found: dict[str, Any] = {
        "net": type(subject.backbone.net).__name__,
        "parameters": layout.parameters,
        "trainable": layout.elements,
        "device": device,
        "ranks": ranks,
        "stage": engine.stage,
        "precision": engine.precision,
        "micro_batch": subject.micro_batch,
        "accumulate": accumulate,
        "memory": memory,
        "bytes": {name: round(size) for name, size in parts.items() if name != "drawing"},
        "flops_per_step": subject.flops * accumulate,
        "refresh_payload": _refresh(variant, subject),
    }
    if subject.walks:
        found["assumed"] = "one sampler step per update for the latents that the method draws itself"
    found |= _row(planner, variant, subject, memory, rates)
    found["change"] = None if found["fits"] else cheapest_change(planner, variant, memory)
    found["table"] = [_row(planner, Variant(config, k), subject, memory, rates) for k in RANKS]
    drawing = planner.drawing(engine.precision, subject, _drawn_at_once(config, subject) or 1)
    found["run"] = plan_whole_run(resolve(config), subject, drawing, planner.buckets(engine), rates, ranks)
    return found


def _drawn_at_once(config: RunConfig, subject: Subject) -> int:
    """The most images that a rank draws together; 0 where the run draws none."""
    draws = any(spec.latents for spec in subject.method.streams())
    return max(config.prepare.batch if draws else 0, config.evaluate.batch if config.evaluate.enabled else 0)


def step_flops(config: RunConfig, ranks: int) -> float:
    """Operations of a rank's training step, counted."""
    return Subject(config, ranks).flops * config.train.accumulate


def pass_flops(config: RunConfig) -> int:
    """Operations of a guided sampler pass for one image, counted."""
    return Subject(config, 1).drawing(1).forward.flops


def _row(planner: Planner, variant: Variant, subject: Subject, memory: float, rates: Rates | None) -> dict[str, Any]:
    """The micro-batch of `subject` on the variant's ranks."""
    config, ranks = variant.config, variant.ranks
    parts = planner.memory(variant, subject)
    layout = subject.layout(config.engine.stage, config.engine.precision, ranks)
    forwards = sum(len(group.forwards) for group in subject.training)
    accumulate = config.train.accumulate
    sent = traffic(layout, planner.buckets(config.engine), forwards, accumulate, len(subject.training))
    drawing = parts.pop("drawing")
    row: dict[str, Any] = {
        "ranks": ranks,
        "peak": round(sum(parts.values())),
        "drawing": round(drawing),
        "fits": max(sum(parts.values()), drawing) <= memory,
        "payload": {name: round(size) for name, size in sent.payload.items()},
        "collectives": sent.collectives,
    }
    if rates is not None:
        seconds = step_seconds(subject.flops * accumulate, layout, sent, rates)
        total = sum(seconds.values())
        row |= {"seconds": seconds, "step_seconds": total}
        row["samples_per_second"] = subject.micro_batch * accumulate * ranks / total
    return row


def _refresh(variant: Variant, subject: Subject) -> int:
    """Bytes that a refresh of the mask sends."""
    config, ranks, slots = variant.config, variant.ranks, len(subject.trained)
    sharded = ranks > 1 and config.engine.stage > 0 and config.mask.keep < 1
    return payload_bytes(slots if config.mask.scope == "matrix" else 1, slots, ranks) if sharded else 0


def cheapest_change(planner: Planner, variant: Variant, memory: float) -> dict[str, Any] | None:
    """The cheapest change with which a run fits into `memory` bytes per rank.

    That is the cheapest single change that is enough; otherwise the cheapest changes together, without those that prove
    unnecessary. None if nothing fits on 1,024 ranks.
    """
    method = planner.subject(variant).method

    def size(changes: Sequence[Change]) -> float:
        try:
            return planner.fullest(variant.changed(changes))
        except ConfigError:  # a stream with a share of the batch may not divide
            return math.inf

    together: list[Change] = []
    found = next(([change] for change in variant.changes(method) if size([change]) <= memory), None)
    while found is None:
        further = next(variant.changed(together).changes(method), None)
        if further is None:
            return None
        together.append(further)
        found = together if size(together) <= memory else None
    for change in found[::-1] if len(found) > 1 else []:
        without = [other for other in found if other is not change]
        if variant.changed(without).is_valid and size(without) <= memory:
            found = without
    merged = {key: value for change in found for key, value in change.items()}
    overrides = [f"{key}={str(value).lower()}" for key, value in merged.items() if key != "ranks"]
    return {"overrides": overrides, "ranks": merged.get("ranks", variant.ranks), "peak": int(size(found))}
