"""A method inside another one, which adds to its losses and leaves all else to it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.core.types import Losses
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.methods.base import LossFunction, Method, Setup, Step


class Wrapped(Method):
    """A method that does what `method` does. Subclasses override what they add, and `again`."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.needs_original, self.needs_teacher = method.needs_original, method.needs_teacher
        self.calibration_images, self.reference_mask = method.calibration_images, method.reference_mask
        self.companion, self.rank_per_concept = method.companion, method.rank_per_concept
        self.takes_together, self.reads_attention = method.takes_together, method.reads_attention

    @abstractmethod
    def again(self, method: Method) -> Method:
        """The same around another method: that of one concept."""

    def prepare(self, setup: Setup) -> Method:
        return self.again(self.method.prepare(setup))

    def streams(self) -> Sequence[StreamSpec]:
        return self.method.streams()

    def loss_groups(self) -> Sequence[LossFunction]:
        return self.method.loss_groups()

    def losses(self, step: Step) -> Losses:
        return self.method.losses(step)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return self.method.trainable(groups)

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any] | None:
        return self.method.adapter(groups)

    def refine(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        return self.method.refine(backbone, concepts)

    def fusion(self) -> Callable[[str, Tensor], Tensor] | None:
        return self.method.fusion()

    def extra_concepts(self, setup: Setup) -> Mapping[str, Sequence[str]]:
        return self.method.extra_concepts(setup)

    def saliency(self, step: Step) -> Losses:
        return self.method.saliency(step)

    def combine(self, gradients: Sequence[ShardedVector]) -> ShardedVector:
        return self.method.combine(gradients)

    def alone(self, progress: float) -> LossFunction | None:
        return self.method.alone(progress)

    def candidate_every(self, updates: int) -> int:
        return self.method.candidate_every(updates)

    def judge(self, recent: Mapping[str, float]) -> float:
        return self.method.judge(recent)
