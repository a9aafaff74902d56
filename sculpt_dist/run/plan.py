"""The steps of one concept: how many collect saliency, how many train, and when the mask turns over."""

from __future__ import annotations

from dataclasses import dataclass

from sculpt_dist.config.checks import as_steps
from sculpt_dist.config.schema import EngineConfig, MaskConfig, TrainConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.masking import MAX_GENERATIONS
from sculpt_dist.maths.schedules import learning_rate_factor
from sculpt_dist.methods.base import Method

EPOCHS = 10  # of a concept in Sculpting Memory's code


@dataclass(frozen=True)
class Plan:
    """`collect` steps, then `updates`. Update u has the progress u / updates."""

    collect: int
    updates: int
    refresh: int  # updates between turnovers; 0: none
    turnover: float
    until: float
    lr: float
    warmup: float
    masked: bool
    offset: int = 0  # collect steps that the published clock counts as training
    schedule: str = "one_cycle"
    epochs: int = 0  # in which the published clock counts the mask's progress; 0: by updates

    @property
    def steps(self) -> int:
        return self.collect + self.updates

    def progress(self, step: int) -> float:
        return (step - self.collect + self.offset) / (self.updates + self.offset)

    def learning_rate(self, step: int) -> float:
        if step < self.collect:
            return 0.0
        done = (step - self.collect) / (self.updates + self.offset)
        return self.lr * learning_rate_factor(self.schedule, done, self.warmup)

    def refreshes_after(self, step: int) -> bool:
        done = step - self.collect + 1 + self.offset
        return self.masked and self.refresh > 0 and done % self.refresh == 0 and self.mask_progress(step) < self.until

    def mask_progress(self, step: int) -> float:
        """The progress after this step, by which the mask turns over."""
        if not self.epochs:
            return self.progress(step + 1)
        done, total = step - self.collect + self.offset, self.updates + self.offset
        return done * self.epochs // total / self.epochs  # that of the epoch in which the step lies


def make_plan(train: TrainConfig, mask: MaskConfig, engine: EngineConfig, method: Method, at_once: int = 1) -> Plan:
    """The plan of every concept of a run, or of `at_once` concepts that train together.

    Raises ConfigError where mask, steps and method do not fit together.
    """
    collect, refresh = (at_once * as_steps(steps, train.steps) for steps in (mask.collect, mask.refresh))
    updates = at_once * train.steps
    if not mask.turnover:
        refresh = 0
    masked = mask.keep < 1
    if masked and refresh and updates / refresh > MAX_GENERATIONS - 1:
        raise ConfigError(
            f"mask.refresh={mask.refresh}: more than {MAX_GENERATIONS - 1} turnovers in train.steps={train.steps}; "
            "refresh less often"
        )
    if masked and not collect and mask.saliency != "random":
        raise ConfigError(
            "mask.collect=0: a mask needs collected gradients; use at least 1 step, mask.saliency=random or mask.keep=1"
        )
    if engine.moments == "open" and method.reference_mask:
        raise ConfigError(
            "engine.moments=open: with method.reference_compat closed weights keep moving, as published; "
            "use engine.moments=all"
        )
    needed = collect if masked else 0
    return Plan(
        collect=needed,
        updates=updates,
        refresh=refresh,
        turnover=mask.turnover,
        until=mask.until,
        lr=train.lr,
        warmup=train.warmup,
        masked=masked,
        offset=needed if method.reference_mask else 0,
        schedule=train.schedule,
        epochs=EPOCHS if method.reference_mask else 0,
    )
