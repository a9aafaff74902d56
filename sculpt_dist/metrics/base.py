"""What a classifier and a metric are. A classifier is one file in `metrics/classifiers/`, a metric one file in `metrics/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Mapping, Sequence

from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What was recognised: indices into the classifier's `objects` and `styles`; -1 says "none of them"."""

    objects: Tensor  # [B] int64
    styles: Tensor | None  # [B] int64; None where the classifier knows no styles


class Classifier(ABC):
    """Recognises objects, and styles if it can, in images. A user's own detector is a subclass, named `own:package.module:Class`."""

    objects: tuple[str, ...]
    styles: tuple[str, ...] = ()

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        """`where` is what follows the kind in `evaluate.classifier=kind:where`; objects and styles are those evaluated."""
        self.objects, self.styles = tuple(objects), tuple(styles)

    @abstractmethod
    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] -> Verdict."""


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
