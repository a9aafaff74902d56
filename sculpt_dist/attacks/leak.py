"""What the loss gives away, without drawing anything: the leak score, the reward of ReLAPSe (arXiv 2602.00350).

    leak = mean over times of [ MSE(e, e(z_t, "")) - MSE(e, e(z_t, prompt)) ]

on the latent z of an image of the concept: how much the prompt still helps to predict it. Told beside that of the
original model. Nothing is judged, so there is no rate of success.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Model, Victim, times
from sculpt_dist.maths.losses import mse


@dataclass(frozen=True)
class Config:
    """The options of leak."""

    times: int = 12
    """Times at which the loss is measured."""


class Attack(Base):
    needs_original = True
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            clean = victim.reference(case)
            noises = [
                torch.randn(clean.shape, generator=victim.rng("leak", case.seed, i)) for i in range(self.config.times)
            ]
            leaks = (leak(model, case, clean, noises) for model in (victim.model, victim.known))
            yield Attempt(place, scores=dict(zip(("leak", "leak_original"), leaks)))


@torch.no_grad()
def leak(model: Model, case: Case, clean: Tensor, noises: Sequence[Tensor]) -> float:
    """How much lower the loss is with the prompt than without, for one noise [1, C, H, W] at each time."""
    backbone, gains = model.backbone, []
    for time, noise in zip(times(model, len(noises)), noises):
        noise = noise.to(clean)
        noisy, goal = backbone.corrupt(clean, noise, time), backbone.goal(clean, noise, time)
        without, with_prompt = (
            mse(model.predict(noisy, time, cond), goal) for cond in (model.embed(""), model.embed(case.prompt))
        )
        gains.append(without - with_prompt)
    return float(torch.stack(gains).mean())
