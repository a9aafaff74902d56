"""SalUn: random labels under a static, global saliency mask (Fan et al., arXiv 2310.12508).

This is the paper's variant for classes of a text-to-image model. Let e be the student, x_f samples of the target, c_f
its prompt, c_o another prompt (here the superclass's), and sg stop-gradient:

    saliency: gradient of -MSE(noise, e(x_f, "") + w (e(x_f, c_f) - e(x_f, "")))
    L = MSE(e(x_f, c_f), sg e(x_f, c_o)) + beta MSE(e(x_r, c_r), goal_r)

The mask is `mask: {scope: global, keep: 0.5, refresh: 0}`, collected before training and never changed. The retained
samples x_r are those of the superclass; published runs retain all other classes of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculpt_dist.core.types import Losses
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices


@dataclass(frozen=True)
class Config:
    """The options of salun."""

    name: str = "salun"
    """Name of this method."""
    retain_weight: float = 0.1
    """Weight of denoising the retained samples, beta."""
    saliency_guidance: float = 8.5
    """Guidance w of the saliency's prediction; published is (1 + 7.5) e(x_f, c_f) - 7.5 e(x_f, \"\")."""


class Method(Base):
    """Trains all matrices of the net."""

    needs_teacher = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, "all")

    def saliency(self, step: Step) -> Losses:
        target = step.batch.target
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, goal = step.corrupted(target, time, "target")
        empty, with_prompt = step.student.all([(noisy, time, step.empty(len(noisy))), (noisy, time, target.cond)])
        return Losses({"saliency": -mse(empty + self.config.saliency_guidance * (with_prompt - empty), goal)})

    def losses(self, step: Step) -> Losses:
        target, superclass = step.batch.target, step.batch.superclass
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B], the same for both
        noisy, _ = step.corrupted(target, time, "target")
        retained, goal = step.corrupted(superclass, time, "superclass")
        (label,) = step.student.without_gradient([(noisy, time, step.batch.target_as_superclass)])
        predicted = step.student.all([(noisy, time, target.cond), (retained, time, superclass.cond)])
        return Losses(
            {"forget": mse(predicted[0], label), "retain": self.config.retain_weight * mse(predicted[1], goal)}
        )
