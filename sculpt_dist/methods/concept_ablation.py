"""Concept Ablation, model-based: the target's prompt learns to do what the superclass's does (Kumari et al., arXiv 2303.13516).

With e the student, x_s noisy samples of the superclass, c_f and c_s the target's and the superclass's prompts, sg stop-gradient:

    L = MSE(e(x_s, c_f), sg e(x_s, c_s))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices
from sculpt_dist.types import Losses


@dataclass(frozen=True)
class Config:
    name: str = "concept_ablation"


class Method(Base):
    """Trains the cross-attention; draws no samples of the target."""

    samples = ("superclass",)

    def __init__(self, config: Config) -> None:
        self.config = config

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, "cross_attention")

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        superclass = step.batch.superclass
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, _ = step.corrupted(superclass, time, "superclass")
        (label,) = step.student.without_gradient([(noisy, time, superclass.cond)])
        return Losses({"forget": mse(step.student(noisy, time, step.batch.superclass_as_target), label)})
