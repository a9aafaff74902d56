"""EraseDiff: forgetting weighted so that retaining comes first (Wu et al., arXiv 2401.05779).

Let e be the student, x_f samples of the target, c_f its prompt, c_m another prompt (here the superclass's), x_s samples
of the superclass, and sg stop-gradient:

    L_f = MSE(e(x_f, c_f), sg e(x_f, c_m))        L_r = MSE(e(x_s, c_s), goal_s)

With g_f and g_r, the reduced gradients of both over all trainable weights, the update is

    g_r + w g_f,    w = max(0, eta - <g_f, g_r> / |g_f|^2),

the smallest change of g_r with which L_f falls at a rate of at least eta |g_f|^2. The paper subtracts from L_f the
minimum that a few inner steps reach. It is a constant for the outer step, whose gradient it does not change, so those
steps are left out. The published code for Stable Diffusion sets a fixed w (`weight`) of 0.1 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculpt_dist.core.types import Losses
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.methods.base import LossFunction, Step, matrices
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.parts.terms import denoised_superclass, relabelled


@dataclass(frozen=True)
class Config:
    """The options of erase_diff."""

    name: str = "erase_diff"
    """Name of this method."""
    eta: float = 1.0
    """Rate at which the forget loss has to fall, in units of its squared gradient. UNVERIFIED: the paper's value."""
    weight: float | None = None
    """A fixed weight of the forget loss, as in the published code; null follows the paper's rule."""
    trains: str = "all"
    """Group of parameters that trains."""


class Method(Base):
    """Trains one group's matrices."""

    needs_teacher = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.forget(step)

    def losses(self, step: Step) -> Losses:
        return Losses({**self.forget(step).terms, **self.retain(step).terms})

    def loss_groups(self) -> Sequence[LossFunction]:
        return (self.forget, self.retain)

    def forget(self, step: Step) -> Losses:
        return Losses({"forget": relabelled(step)})

    def retain(self, step: Step) -> Losses:
        return Losses({"retain": denoised_superclass(step)})

    def combine(self, gradients: Sequence[ShardedVector]) -> ShardedVector:
        forget, retain = gradients
        weight = self.config.weight
        if weight is None:
            length = forget.dot(forget)
            weight = max(0.0, self.config.eta - forget.dot(retain) / length) if length else 0.0
        return retain.plus(forget, weight)
