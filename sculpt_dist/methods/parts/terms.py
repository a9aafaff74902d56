"""Loss terms that several methods share, each a mean over the batch, []."""

from __future__ import annotations

from torch import Tensor

from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Step


def relabelled(step: Step) -> Tensor:
    """MSE(e(x_f, c_f), sg e(x_f, c_s)): the target's prompt learns what the superclass's prompt predicts now."""
    target = step.batch.target
    time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
    noisy, _ = step.corrupted(target, time, "target")
    (label,) = step.student.without_gradient([(noisy, time, step.batch.target_as_superclass)])
    return mse(step.student(noisy, time, target.cond), label)


def denoised_superclass(step: Step) -> Tensor:
    """MSE(e(x_s, c_s), goal_s): plain denoising of the superclass."""
    superclass = step.batch.superclass
    time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
    noisy, goal = step.corrupted(superclass, time, "superclass")
    return mse(step.student(noisy, time, superclass.cond), goal)
