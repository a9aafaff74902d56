"""The original model draws the first steps, the unlearned one the rest (arXiv 2505.17013: 0, 1 or 2 of 50 steps).

The first steps decide what an image shows. If the unlearned model then finishes the concept, it still knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.backbones.parts.guidance import Guided


@dataclass(frozen=True)
class Config:
    """The options of completion."""

    steps: list[int] = field(default_factory=lambda: [1, 2, 3])
    """How many of the sampler's steps the original model draws."""


PUBLISHED = {"steps": [1, 2]}


class Attack(Base):
    counts = "mean"
    needs_original = True
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            for steps in self.config.steps:
                predict = begun_by(victim.known.guided(case), victim.model.guided(case), steps)
                latents = victim.model.latents(predict, victim.model.noise(case.seed))
                yield Attempt(place, victim.model.image(latents), f"{steps} steps", {"steps": steps})


def begun_by(first: Guided, then: Guided, steps: int) -> Guided:
    """A prediction that is `first` for so many steps of a sampler, and `then` afterwards."""
    times: set[float] = set()  # some samplers call the net twice at a time

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        times.add(float(time))
        with torch.no_grad():
            return (first if len(times) <= steps else then)(latents, time)

    return predict
