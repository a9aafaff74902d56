"""Restricted gradient: the gradients of forgetting and retaining may not cancel each other.

Ko et al., "Boosting Alignment for Post-Unlearning", NeurIPS 2024.

The two losses have one reduced gradient each, g_f and g_r, over all trainable weights. If <g_f, g_r> < 0, each is
projected onto the orthogonal complement of the other; inner products cover the shards of all ranks. The update is

    g_f' + r g_r',  r = 1.5

UNVERIFIED: a reconstruction, because the paper could not be read here. The rule follows descriptions by reference
implementations. The losses (relabelling with the superclass's prompt, plain denoising of the superclass) and the
sequence of concepts are our own.
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
    """The options of rgd."""

    name: str = "rgd"
    """Name of this method."""
    retain_scale: float = 1.5
    """Factor on the retaining gradient, r."""
    trains: str = "cross_attention"
    """Group of the backbone's parameters that trains."""


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
        against = forget.dot(retain)
        if against >= 0:
            return forget.plus(retain, self.config.retain_scale)
        projected_forget = forget.plus(retain, -against / retain.dot(retain))
        projected_retain = retain.plus(forget, -against / forget.dot(forget))
        return projected_forget.plus(projected_retain, self.config.retain_scale)
