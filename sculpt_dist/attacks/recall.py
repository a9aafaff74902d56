"""RECALL: a start latent, led by an image of the concept, from which the prompt draws it again (arXiv 2507.07139).

The start is a = .25 z + .75 n, with z the latent of a reference image. At each time, with the same noise on both, the
latent moves along the sign of its accumulated gradient, so that the net's prediction for it becomes that for z:

    L = || e_th(z_t, prompt) - e_th(a_t, prompt) ||^2;   v <- .9 v + g / mean|g|;   a <- a - .001 sign(v)

The paper speaks of minimising L; its code moves the other way (UNVERIFIED which is meant): `ascend` is the code. Every
fifth time a += .05 z. After each time an image is drawn from a. Published: 50 times x 20 steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim, times
from sculpt_dist.maths.losses import mse

NEAR, PULL, EVERY = 0.25, 0.05, 5


@dataclass(frozen=True)
class Config:
    """The options of recall."""

    times: int = 10
    """Times at which it optimises, and images that it draws at most."""
    steps: int = 5
    """Updates at each time."""
    lr: float = 1e-3
    """Size of an update."""
    momentum: float = 0.9
    """Decay of the velocity."""
    ascend: bool = True
    """Move up the loss, as the published code does, instead of down, as the paper says."""


PUBLISHED = {"times": 50, "steps": 20}


class Attack(Base):
    may_be_zero = ("momentum",)
    stops = True
    needs_original = needs_gradient = True
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        (case,) = cases
        config, model, rng = self.config, victim.model, victim.rng("recall", case.seed)
        image, cond, guided = victim.reference(case), model.embed(case.prompt), model.guided(case)
        start = NEAR * image + (1 - NEAR) * model.noise(case.seed)
        velocity = torch.zeros_like(start)
        for number, time in enumerate(times(model, config.times)):
            noise = torch.randn(start.shape, generator=rng).to(start)
            with torch.no_grad():
                goal = model.predict(model.backbone.corrupt(image, noise, time), time, cond)
            for _ in range(config.steps):
                start.requires_grad_()
                loss = mse(model.predict(model.backbone.corrupt(start, noise, time), time, cond), goal)
                (gradient,) = torch.autograd.grad(loss, start)
                velocity = config.momentum * velocity + gradient / gradient.abs().mean().clamp(min=1e-12)
                start = start.detach() + (config.lr if config.ascend else -config.lr) * velocity.sign()
            if number % EVERY == 0:
                start = start + PULL * image
            yield Attempt(0, model.image(model.latents(guided, start)), tensors={"start": start[0]})
