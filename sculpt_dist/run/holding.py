"""Holding general prompts: a term that any method that trains takes, on a stream of its own.

    L = L of the method + w MSE(e(x_h, c_h), sg e0(x_h, c_h))

e is the student, e0 the net before the first concept (or before this one), c_h a prompt of the list and x_h an image
that the base model drew of it. Where a method combines several gradients, the term belongs to the last one. A closed
form has no steps, and preserves the prompts with those of the superclass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sculpt_dist.config.schema import Concept, HoldConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import shown
from sculpt_dist.core.types import Losses
from sculpt_dist.data.prompt_files import read_prompts
from sculpt_dist.data.prompts import naming
from sculpt_dist.data.streams import HOLD, StreamSpec
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import LossFunction, Method, Step
from sculpt_dist.run.wrapped import Wrapped


def hold_prompts(hold: HoldConfig, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """The prompts to hold; none without a list. Raises ConfigError for one that names a target."""
    if hold.prompts is None:
        return ()
    listed = tuple(dict.fromkeys(line.prompt for line in read_prompts(hold.prompts)))
    found = listed[: hold.samples]
    if len(listed) > len(found):
        warnings.warn(
            f"{hold.prompts}: contains {len(listed):,} prompts; only the first {len(found):,} are held: hold.samples",
            stacklevel=2,
        )
    for concept in concepts:
        named = next(filter(naming(" ".join(concept.target.split())).search, found), None)
        if named is not None:
            raise ConfigError(
                f"hold.prompts={shown(hold.prompts)}: the prompt {shown(named)!r} names the target "
                f"{shown(concept.target)!r}, which would be held and forgotten at once; remove it from the list"
            )
    return found


class Holding(Wrapped):
    """A method with the term for held prompts in its last group of losses."""

    def __init__(self, method: Method, hold: HoldConfig) -> None:
        super().__init__(method)
        self.hold = hold
        self.needs_original = method.needs_original or hold.source == "original"
        self.needs_teacher = method.needs_teacher or hold.source == "teacher"

    def again(self, method: Method) -> Method:
        return Holding(method, self.hold)

    def streams(self) -> Sequence[StreamSpec]:
        return (*self.method.streams(), StreamSpec(HOLD, share=self.hold.share))

    def loss_groups(self) -> Sequence[LossFunction]:
        *groups, last = self.method.loss_groups()
        return (*groups, lambda step: self._with_held(last(step), step))

    def losses(self, step: Step) -> Losses:
        return self._with_held(self.method.losses(step), step)

    def _with_held(self, losses: Losses, step: Step) -> Losses:
        held = step.batch[HOLD]
        time = step.backbone.sample_time(step.rng.at(held.positions).uniform("hold time"))  # [B]
        noisy, _ = step.corrupted(held, time, HOLD)
        (kept,) = step.frozen(self.hold.source).all([(noisy, time, held.cond)])
        term = mse(step.student(noisy, time, held.cond), kept)
        return Losses({**losses.terms, HOLD: self.hold.weight * term})
