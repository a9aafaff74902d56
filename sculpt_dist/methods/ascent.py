"""Gradient ascent: the denoising loss of the target's samples rises. The lower bound that comparisons expect.

As a baseline it is older than this field; for diffusion models see Fan et al., arXiv 2310.12508, and Zhang et al.,
arXiv 2402.11846. Let e be the student, x_f samples of the target and x_s of the superclass:

    L = -MSE(e(x_f, c_f), goal_f) + r MSE(e(x_s, c_s), goal_s)

The first term has no lower bound: with many updates or a high learning rate the model draws noise, whatever it is asked
for. `npo` bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices


@dataclass(frozen=True)
class Config:
    """The options of ascent."""

    name: str = "ascent"
    """Name of this method."""
    retain_weight: float = 0.0
    """Weight of denoising the superclass, r; 0 needs none of its samples."""
    trains: str = "all"
    """Group of parameters that trains."""


class Method(Base):
    """Trains one group's matrices."""

    needs_teacher = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def streams(self) -> Sequence[StreamSpec]:
        superclass = (StreamSpec("superclass"),) if self.config.retain_weight else ()
        return (StreamSpec("target"), *superclass)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B], the same for both
        noisy, goal = step.corrupted(step.batch.target, time, "target")
        requests = [(noisy, time, step.batch.target.cond)]
        if not self.config.retain_weight:
            return Losses({"forget": -mse(step.student.all(requests)[0], goal)})
        superclass = step.batch.superclass
        retained, retained_goal = step.corrupted(superclass, time, "superclass")
        forgotten, kept = step.student.all([*requests, (retained, time, superclass.cond)])
        return Losses({"forget": -mse(forgotten, goal), "retain": self.config.retain_weight * mse(kept, retained_goal)})
