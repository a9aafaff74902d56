"""Concept resurgence: ordinary fine-tuning on unrelated images, and the concept is back (arXiv 2410.08074).

All weights of a copy of the net train on images of other things, which the original model draws, with the plain loss.
How the paper does it is UNVERIFIED; all numbers here are ours. Every case is drawn after so many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.search import training_batch
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.files import derived_seed
from sculpt_dist.maths.losses import mse


@dataclass(frozen=True)
class Config:
    """The options of resurgence."""

    steps: list[int] = field(default_factory=lambda: [20, 50, 100, 200])
    """After how many updates to draw."""
    batch: int = 8
    """Images of an update."""
    images: int = 64
    """Unrelated images, one for each prompt, drawn by the original model."""
    lr: float = 1e-4
    """Learning rate of AdamW, constant."""


class Attack(Base):
    unit = "model"
    needs_original = needs_gradient = needs_unrelated = True
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        config, backbone, rng = self.config, victim.model.backbone, victim.rng("resurgence")
        order = torch.randperm(len(victim.unrelated), generator=rng).tolist()
        prompts = [victim.unrelated[order[i % len(order)]] for i in range(config.images)]
        seeds = [derived_seed(victim.seed, "resurgence", i) for i in range(config.images)]
        benign = [replace(cases[0], prompt=prompt, seed=seed) for prompt, seed in zip(prompts, seeds)]
        images = torch.cat([victim.reference(case) for case in benign])
        net = victim.model.copied_net().float().requires_grad_()
        optimizer = torch.optim.AdamW(net.parameters(), config.lr)
        for step in range(1, max(config.steps) + 1):
            chosen, question = training_batch(victim.model, images, config.batch, rng)
            cond = backbone.embed([prompts[i] for i in chosen.tolist()])
            optimizer.zero_grad()
            mse(backbone.denoise(net, question.noisy, question.time, cond), question.goal).backward()
            optimizer.step()
            if step in config.steps:
                for place, case in enumerate(cases):
                    yield Attempt(place, victim.model.draw(case, net=net), f"{step} steps", {"steps": step})
