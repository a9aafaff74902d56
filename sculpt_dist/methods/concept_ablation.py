"""Concept Ablation, model-based: the target's prompt learns the prediction of the superclass's prompt.

Kumari et al., arXiv 2303.13516.

Let e be the student, x_s noisy samples of the superclass, c_f and c_s the prompts of target and superclass, and sg
stop-gradient:

    L = MSE(e(x_s, c_f), sg e(x_s, c_s))

For objects and styles, the paper trains only the keys and values of the cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices


@dataclass(frozen=True)
class Config:
    """The options of concept_ablation."""

    name: str = "concept_ablation"
    """Name of this method."""
    parts: list[str] = field(default_factory=lambda: ["k", "v"])
    """Matrices of the cross-attention that train: any of q, k, v, out."""


class Method(Base):
    """Trains matrices of the cross-attention; draws no samples of the target."""

    needs_teacher = False

    def __init__(self, config: Config) -> None:
        unknown = set(config.parts) - {"q", "k", "v", "out"}
        if unknown or not config.parts:
            raise ConfigError(f"method.parts contains {sorted(unknown) or 'nothing'}: choose from q, k, v, out")
        self.config = config

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("superclass"),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return [name for part in self.config.parts for name in matrices(groups, f"cross_attention.{part}")]

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        superclass = step.batch.superclass
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, _ = step.corrupted(superclass, time, "superclass")
        (label,) = step.student.without_gradient([(noisy, time, superclass.cond)])
        return Losses({"forget": mse(step.student(noisy, time, step.batch.superclass_as_target), label)})
