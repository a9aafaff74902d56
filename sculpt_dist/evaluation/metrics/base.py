"""What a metric is: one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor


class Metric(ABC):
    """A score with additive state: ranks update with their own images, the states are summed, `result` reads the sum."""

    @abstractmethod
    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w] and the prompts that they were drawn with."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Float64 sums only; the states of several ranks are added."""

    @abstractmethod
    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """The score from summed state."""
