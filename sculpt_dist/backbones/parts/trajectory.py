"""Latents that the student draws itself: the path of a first-order sampler, continued from update to update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sculpt_dist.backbones.parts.guidance import Guided
from sculpt_dist.backbones.parts.schedules import Schedule
from sculpt_dist.core.types import Denoiser, TextCond


class Guide(Protocol):
    """What a trajectory needs of a backbone."""

    schedule: Schedule

    def guided(self, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float) -> Guided: ...


class Trajectory:
    """One micro-batch's latents before sampler step `index` (0 = pure noise), kept between updates and in checkpoints.

    The sampler is DDIM without noise, or Euler for flow matching. Both are of first order, so the latents are its whole
    state.
    """

    def __init__(self, backbone: Guide) -> None:
        self.backbone, self.schedule = backbone, backbone.schedule
        self.index = 0
        self.latents: Tensor | None = None  # [B, C, H, W]
        self.prompts: tuple[str, ...] = ()  # B, one per latent

    def continues_at(self, index: int) -> bool:
        """Whether `index` is the next step; otherwise the trajectory starts again."""
        return self.latents is not None and index == self.index + 1

    def begin(self, noise: Tensor, prompts: Sequence[str], steps: int) -> None:
        """Start from unit normal noise [B, C, H, W], for `steps` steps; the prompts stay the same until the end."""
        self.latents, self.index = self.schedule.first_latents(self.schedule.first_order(steps), noise), 0
        self.prompts = tuple(prompts)

    def advance_to(
        self, index: int, steps: int, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """(latents [B, C, H, W], their time [B]) before step `index` of `steps`, without gradient.

        All ranks take the same steps.
        """
        assert self.latents is not None and index >= self.index, "begin() comes first, and the index never goes back"
        sampler = self.schedule.first_order(steps)
        predict = self.backbone.guided(denoiser, cond, negative, guidance)
        latents = self.latents
        with torch.no_grad():
            for time in sampler.timesteps[self.index : index]:
                latents = sampler.step(predict(latents, time), time, latents, return_dict=False)[0]
        self.latents, self.index = latents, index
        time = sampler.timesteps[index]
        return latents, time.to(latents.device).expand(len(latents))
