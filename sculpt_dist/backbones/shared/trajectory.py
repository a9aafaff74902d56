"""Latents that the net being trained draws by itself: the path of a first-order sampler, walked on from step to step."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from sculpt_dist.backbones.shared.schedules import Schedule
from sculpt_dist.types import Denoiser, TextCond


def guided(denoiser: Denoiser, latents: Tensor, time: Tensor, both: TextCond, guidance: float) -> Tensor:
    """Classifier-free guidance, e(x, n) + g (e(x, c) - e(x, n)), [B, C, H, W]; `both` [2 B, ...] holds the negatives, then the prompts."""
    noisy = torch.cat([latents, latents])  # [2 B, C, H, W]
    without, with_prompt = denoiser(noisy, time.to(noisy).expand(len(noisy)), both).chunk(2)
    return without + guidance * (with_prompt - without)


class Trajectory:
    """One micro-batch's latents before sampler step `index` (0 = pure noise), kept between updates and in checkpoints.

    The sampler is DDIM without noise, or Euler for flow matching: of first order, so that the latents are all there is to remember.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.index = 0
        self.latents: Tensor | None = None  # [B, C, H, W]

    def walk_to(
        self, index: int, steps: int, denoiser: Denoiser, noise: Callable[[], Tensor], cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """(latents [B, C, H, W], their time [B]) before step `index` of `steps`, drawn without gradient.

        From where the trajectory is when that is the step before, else from fresh noise. All ranks walk the same steps together.
        """
        sampler = self.schedule.first_order(steps)
        if self.latents is None or index != self.index + 1:
            self.latents, self.index = self.schedule.first_latents(sampler, noise()), 0
        both = TextCond.cat([negative, cond])
        with torch.no_grad():
            for time in sampler.timesteps[self.index : index]:
                predicted = guided(denoiser, self.latents, time, both, guidance)
                self.latents = sampler.step(predicted, time, self.latents, return_dict=False)[0]
        self.index = index
        time = sampler.timesteps[index]
        return self.latents, time.to(self.latents.device).expand(len(self.latents))
