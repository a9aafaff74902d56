"""Concept Ablation, model-based: the target's prompt learns to do what the superclass's does.

Kumari et al., arXiv 2303.13516.

With e the student, x_s noisy samples of the superclass, c_f and c_s the target's and the superclass's prompts, sg
stop-gradient:

    L = MSE(e(x_s, c_f), sg e(x_s, c_s))

Published for objects and styles: keys and values of the cross-attention alone train.
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

    def __init__(self, config: Config) -> None:
        strange = set(config.parts) - {"q", "k", "v", "out"}
        if strange or not config.parts:
            raise ConfigError(f"method.parts holds {sorted(strange) or 'nothing'}: choose from q, k, v, out")
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
