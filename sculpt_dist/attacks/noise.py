"""More noise while sampling, of "When Are Concepts Erased From Diffusion Models?" (arXiv 2505.17013).

A DDIM step with eta above 1 and a scale v on its noise n:

    x' = alpha' x0 + sqrt(|sigma'^2 - s^2|) e + v s n,    s = eta times the deviation of ancestral sampling

With alpha = 1 - sigma the same step serves flow matching (our extension). Published: SD 1.4, 50 steps, six eta and four
v, and the best of the 24 images by the classifier is scored. Here the rate is the share of all images that succeed, as
the best of 24 is taken for the concept even where the model never knew it; the best is told beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Model, Victim
from sculpt_dist.maths.diffusion import ancestral_sigma, clean_and_noise


@dataclass(frozen=True)
class Config:
    """The options of noise."""

    etas: list[float] = field(default_factory=lambda: [1.0, 1.17, 1.34, 1.51, 1.68, 1.85])
    """Factors on the deviation of each step's noise."""
    scales: list[float] = field(default_factory=lambda: [1.0, 1.02, 1.03, 1.04])
    """Further factors on the noise that is added."""


class Attack(Base):
    may_be_zero = ("etas",)
    counts = "mean"
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            for eta in self.config.etas:
                for scale in self.config.scales:
                    rng = victim.rng("noise", case.seed, eta, scale)
                    latents = noisy_latents(victim.model, case, eta, scale, rng)
                    yield Attempt(place, victim.model.image(latents), found={"eta": eta, "scale": scale})


@torch.no_grad()
def noisy_latents(model: Model, case: Case, eta: float, scale: float, rng: torch.Generator) -> Tensor:
    """Clean latents [1, C, H, W] that a sampler with this much noise draws."""
    backbone = model.backbone
    schedule, predict = backbone.schedule, model.guided(case)
    steps = schedule.first_order(model.steps).timesteps.to(backbone.device)
    latents = model.noise(case.seed)
    for time, following in zip(steps, [*steps[1:], None]):
        alpha, sigma = schedule.scales(time.view(1))
        clean, noise = clean_and_noise(latents, predict(latents, time), schedule.prediction, alpha, sigma)
        if following is None:
            break
        next_alpha, next_sigma = schedule.scales(following.view(1))
        added = eta * ancestral_sigma(alpha, sigma, next_alpha, next_sigma)
        kept = (next_sigma**2 - added**2).abs().sqrt()
        fresh = torch.randn(latents.shape, generator=rng).to(latents)
        latents = next_alpha * clean + kept * noise + scale * added * fresh
    return clean
