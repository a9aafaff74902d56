"""One concept: collect saliency, build the mask, train with turnovers. The loop, and nothing but the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.schema import TrainConfig
from sculpt_dist.core.progress import progress
from sculpt_dist.core.types import ConceptBatch
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import ConceptStreams, Draws, micro_batches
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.engine.zero import Engine, FrozenWeights, StepResult
from sculpt_dist.maths.schedules import turnover_share
from sculpt_dist.methods.base import Method, Predictor, Step
from sculpt_dist.run.clock import Clock
from sculpt_dist.run.costs import peak_memory
from sculpt_dist.run.plan import Plan


@dataclass
class LossWindow:
    """Mean loss terms since the last candidate, and the best candidate so far."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    best: float | None = None

    def add(self, terms: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means, after which the window is empty."""
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


@dataclass
class ConceptRun:
    """What the loop works with for one concept.

    A checkpoint keeps `step`, `recent`, `start`, `trajectories` and `candidate`; the rest is rebuilt.
    """

    number: int
    target: str
    method: Method
    plan: Plan
    streams: ConceptStreams
    prompts: ConceptPrompts
    measure: Callable[[], Mapping[str, float]]  # scores of images of the present weights, for methods that judge
    teacher: FrozenWeights | None
    original: FrozenWeights | None
    recent: LossWindow
    start: list[Tensor]  # this rank's fp32 shards before the concept
    trajectories: list[Trajectory]  # one per micro-batch
    steps_before: int = 0  # of all concepts before this one
    candidate: list[Tensor] | None = None
    step: int = 0


def run_concept(
    run: ConceptRun,
    engine: Engine,
    backbone: Backbone,
    train: TrainConfig,
    log: Callable[[Mapping[str, Any]], None],
    due: Callable[[], bool],
    save: Callable[[], None],
    stop: StopRequest,
) -> None:
    """Train one concept from `run.step` to its end; all ranks `save` after a step where `due` is true on any.

    Raises StopRequested, after saving, when any rank received a stop request, and NonFiniteError on all ranks at the
    same step.
    """
    plan, method = run.plan, run.method
    device, first = engine.group.device, engine.group.is_first
    batches = micro_batches(run.streams, backbone.embed, run.prompts, device, run.step, plan.steps, train.workers)
    for step in progress(range(run.step, plan.steps), f"unlearn {run.target}", first, start=run.step):
        clock = Clock(engine.group)
        collecting = step < plan.collect
        with clock("data"):
            parts = [
                _micro_step(run, engine, backbone, train.seed, next(batches), step, micro)
                for micro in range(train.accumulate)
            ]
        loss_functions = [method.saliency] if collecting else method.loss_groups()
        alone = None if collecting else method.alone(plan.progress(step))
        if alone is not None:
            loss_functions = []
            for part in parts:
                with clock("forward"):
                    engine.record(alone(part).terms)
        for i, loss_function in enumerate(loss_functions):
            phase = "collect" if collecting else "train" if i == len(loss_functions) - 1 else "capture"
            for part in parts:
                with clock("forward"):
                    losses = loss_function(part)
                    engine.record(losses.terms)
                with clock("backward"):
                    engine.backward(losses.total)
                with clock("step"):
                    engine.step(phase, plan.learning_rate(step), method.combine)
        with clock("step"):
            if method.companion is not None and not collecting:
                method.companion.step()
            result = engine.end_step(stop.requested, due())
        stopping, saving = stop.accept(result.raised)
        run.step = step + 1
        with clock("refresh"):
            mask_entry = _update_mask(engine, plan, step)
        if not collecting:
            _consider_candidate(run, engine, result.terms)
        log(_entry(run, engine, step, result, mask_entry, clock))
        if stopping or saving:
            save()
        if stopping:
            raise stop.stopped(f"{run.target!r}, step {run.step} of {plan.steps}")
    if run.candidate is not None:
        engine.set_masters(run.candidate)


def _micro_step(
    run: ConceptRun, engine: Engine, backbone: Backbone, seed: int, batch: ConceptBatch, step: int, micro: int
) -> Step:
    """What the method sees of one micro-batch."""
    return Step(
        student=Predictor(backbone, engine.net),
        teacher=Predictor(backbone, engine.net, run.teacher) if run.teacher else None,
        original=Predictor(backbone, engine.net, run.original) if run.original else None,
        batch=batch,
        backbone=backbone,
        rng=Draws(seed, run.number, step, run.streams.layout.positions(micro), engine.group.device),
        trajectory=run.trajectories[micro],
        update=max(0, step - run.plan.collect),
        progress=run.plan.progress(step),
    )


def _update_mask(engine: Engine, plan: Plan, step: int) -> dict[str, Any]:
    """Build the mask after the last collect step and turn it over when due; returns the entries for the log."""
    mask = engine.mask
    if plan.masked and step + 1 == plan.collect:
        mask.build()
        return {"open": mask.open_count, "saliency": mask.spread}
    if step >= plan.collect and plan.refreshes_after(step):
        mask.turn_over(turnover_share(plan.turnover, plan.mask_progress(step)), engine.optimizer.updates)
        if mask.swapped:
            return {
                "saliency": mask.spread,
                "swapped": mask.swapped,
                "turnover": mask.swapped / mask.open_count,
                "overlap": mask.overlap,
            }
    return {}


def _consider_candidate(run: ConceptRun, engine: Engine, terms: Mapping[str, float]) -> None:
    """Keep the weights where the method judges them the best so far."""
    every = run.method.candidate_every(run.plan.updates)
    if not every:
        return
    run.recent.add(terms)
    if run.recent.count == every:
        drawn = run.measure() if run.method.calibration_images else {}
        score = run.method.judge({**run.recent.take(), **drawn})
        if run.recent.best is None or score < run.recent.best:
            run.recent.best, run.candidate = score, engine.masters()


def _entry(
    run: ConceptRun,
    engine: Engine,
    step: int,
    result: StepResult,
    mask_entry: Mapping[str, Any],
    clock: Clock,
) -> dict[str, Any]:
    """One line of metrics.jsonl. `steps` are those of a concept, and `global_step` counts across concepts."""
    entry: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "concept": run.number,
        "target": run.target,
        "step": step,
        "steps": run.plan.steps,
        "global_step": run.steps_before + step,
        "phase": "collect" if step < run.plan.collect else "train",
        "loss": sum(result.terms.values()),
        "terms": result.terms,
        "seconds": round(clock.seconds(), 4),
        "time_shares": clock.shares(),
        "peak_memory_bytes": peak_memory(engine.group.device),
    }
    if step >= run.plan.collect:
        entry |= {"lr": run.plan.learning_rate(step), "open": engine.mask.open_count}
        entry |= {"grad_norm": result.grad_norm, "update_norm": result.update_norm}
    return {**entry, **mask_entry}
