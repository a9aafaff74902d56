"""One concept: collect saliency, build the mask, train with turnovers. The loop, and nothing but the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.load import as_steps
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.progress import progress
from sculpt_dist.core.types import ConceptBatch
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import ConceptStreams, Draws, micro_batches
from sculpt_dist.engine.masking import MAX_GENERATIONS
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.engine.zero import Engine, FrozenWeights
from sculpt_dist.maths.schedules import one_cycle, turnover_share
from sculpt_dist.methods.base import Method, Predictor, Step
from sculpt_dist.run.clock import Clock
from sculpt_dist.run.costs import peak_memory


@dataclass(frozen=True)
class Plan:
    """The steps of one concept: `collect` of them, then `updates`. Update u has progress u / updates."""

    collect: int
    updates: int
    refresh: int
    turnover: float
    until: float
    lr: float
    warmup: float
    masked: bool
    offset: int = 0  # collect steps that the published clock counts as training

    @property
    def steps(self) -> int:
        return self.collect + self.updates

    def progress(self, step: int) -> float:
        return (step - self.collect + self.offset) / (self.updates + self.offset)

    def learning_rate(self, step: int) -> float:
        if step < self.collect:
            return 0.0
        return self.lr * one_cycle((step - self.collect) / (self.updates + self.offset), self.warmup)

    def refreshes_after(self, step: int) -> bool:
        done = step - self.collect + 1 + self.offset
        return self.masked and self.refresh > 0 and done % self.refresh == 0 and self.progress(step + 1) < self.until


def make_plan(config: RunConfig, method: Method) -> Plan:
    """The plan of every concept of a run. Raises ConfigError when the mask would turn over too often."""
    train, mask = config.train, config.mask
    collect, refresh = as_steps(mask.collect, train.steps), as_steps(mask.refresh, train.steps)
    if not mask.turnover:
        refresh = 0
    masked = mask.keep < 1
    if masked and refresh and train.steps / refresh > MAX_GENERATIONS - 1:
        raise ConfigError(
            f"mask.refresh={mask.refresh}: more than {MAX_GENERATIONS - 1} turnovers in train.steps={train.steps}; refresh less often"
        )
    if masked and not collect and mask.saliency != "random":
        raise ConfigError(
            "mask.collect=0: a mask needs collected gradients; use at least 1 step, mask.saliency=random or mask.keep=1"
        )
    if config.engine.moments == "open" and method.reference_mask:
        raise ConfigError(
            "engine.moments=open: as published, closed weights move on (method.reference_compat); use engine.moments=all"
        )
    needed = collect if masked else 0
    offset = needed if method.reference_mask else 0
    return Plan(needed, train.steps, refresh, mask.turnover, mask.until, train.lr, train.warmup, masked, offset)


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
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


@dataclass
class ConceptRun:
    """What the loop works with for one concept; `step`, `recent`, `start`, `trajectories` and `candidate` are the state that a checkpoint keeps."""

    number: int
    target: str
    method: Method
    plan: Plan
    streams: ConceptStreams
    prompts: ConceptPrompts
    measure: Callable[
        [], Mapping[str, float]
    ]  # scores of images that the present weights draw, for methods that ask for them
    teacher: FrozenWeights
    original: FrozenWeights | None
    recent: LossWindow
    start: list[Tensor]  # this rank's fp32 shards before the concept
    trajectories: list[Trajectory]  # one per micro-batch
    candidate: list[Tensor] | None = None
    step: int = 0


def run_concept(
    run: ConceptRun,
    engine: Engine,
    backbone: Backbone,
    config: RunConfig,
    log: Callable[[Mapping[str, Any]], None],
    save: Callable[[], None],
    stop: StopRequest,
) -> None:
    """Train one concept from `run.step` to its end.

    Raises StopRequested, after saving, when any rank was asked to stop, and NonFiniteError on all ranks at the same step.
    """
    plan, method, saved_at = run.plan, run.method, time.monotonic()
    batches = micro_batches(
        run.streams, backbone.embed, run.prompts, engine.group.device, run.step, plan.steps, config.train.workers
    )
    for step in progress(range(run.step, plan.steps), f"unlearn {run.target}", engine.group.is_first, start=run.step):
        clock = Clock(engine.group)
        collecting = step < plan.collect
        with clock("data"):
            micro_steps = [
                _micro_step(run, engine, backbone, config, next(batches), step, micro)
                for micro in range(config.train.accumulate)
            ]
        terms: dict[str, float] = {}
        loss_functions = [method.saliency] if collecting else method.loss_groups()
        for i, loss_function in enumerate(loss_functions):
            phase = "collect" if collecting else "train" if i == len(loss_functions) - 1 else "capture"
            for offer in micro_steps:
                with clock("forward"):
                    losses = loss_function(offer)
                    for name, mean in engine.agree_finite(losses.terms).items():
                        terms[name] = terms.get(name, 0.0) + mean / len(micro_steps)
                with clock("backward"):
                    engine.backward(losses.total)
                with clock("step"):
                    engine.step(phase, plan.learning_rate(step), method.combine)
        run.step = step + 1
        with clock("refresh"):
            tended = _update_mask(engine, plan, step)
        if not collecting:
            _consider_candidate(run, engine, terms)
        log(_entry(run, engine, step, terms, tended, clock))
        due = 0 < config.train.checkpoint_every < time.monotonic() - saved_at
        stopping, due = stop.agreed(due)
        if stopping or due:
            save()
            saved_at = time.monotonic()
        if stopping:
            raise stop.stopped(f"{run.target!r}, step {run.step} of {plan.steps}")
    if run.candidate is not None:
        engine.set_masters(run.candidate)


def _micro_step(
    run: ConceptRun, engine: Engine, backbone: Backbone, config: RunConfig, batch: ConceptBatch, step: int, micro: int
) -> Step:
    """What the method gets to see of one micro-batch."""
    rng = Draws(config.train.seed, run.number, step, run.streams.layout.positions(micro), engine.group.device)
    return Step(
        student=Predictor(backbone, engine.net),
        teacher=Predictor(backbone, engine.net, run.teacher),
        original=Predictor(backbone, engine.net, run.original) if run.original else None,
        batch=batch,
        backbone=backbone,
        rng=rng,
        trajectory=run.trajectories[micro],
        update=max(0, step - run.plan.collect),
        progress=run.plan.progress(step),
    )


def _update_mask(engine: Engine, plan: Plan, step: int) -> dict[str, Any]:
    """Build the mask after the last collect step, turn it over when due; returns what there is to tell of it then."""
    mask = engine.mask
    if plan.masked and step + 1 == plan.collect:
        mask.build()
        return {"open": mask.open_count, "saliency": mask.spread}
    if step >= plan.collect and plan.refreshes_after(step):
        mask.turn_over(turnover_share(plan.turnover, plan.progress(step + 1)), engine.optimizer.updates)
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
    run: ConceptRun, engine: Engine, step: int, terms: Mapping[str, float], tended: Mapping[str, Any], clock: Clock
) -> dict[str, Any]:
    """One line of metrics.jsonl; all ranks enter. `global_step` counts on over the concepts."""
    entry: dict[str, Any] = {
        "concept": run.number,
        "target": run.target,
        "step": step,
        "global_step": run.number * run.plan.steps + step,
        "phase": "collect" if step < run.plan.collect else "train",
        "loss": sum(terms.values()),
        "terms": dict(terms),
        "seconds": round(clock.seconds(), 4),
        "time_shares": clock.shares(),
        "peak_memory_bytes": peak_memory(engine.group.device),
    }
    if step >= run.plan.collect:
        entry |= {"lr": run.plan.learning_rate(step), "open": engine.mask.open_count}
        entry |= {"grad_norm": engine.optimizer.grad_norm, "update_norm": engine.optimizer.update_norm()}
    return entry | tended
