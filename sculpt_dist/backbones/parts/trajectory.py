"""Latents that the net being trained draws by itself: the path of a first-order sampler, walked on from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_dist.backbones.parts.schedules import Schedule
from sculpt_dist.core.types import Denoiser, TextCond


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
        self.prompts: tuple[str, ...] = ()  # B, which the latents are drawn of

    def continues_at(self, index: int) -> bool:
        """Whether `index` is the next step; else a walk begins anew."""
        return self.latents is not None and index == self.index + 1

    def begin(self, noise: Tensor, prompts: Sequence[str], steps: int) -> None:
        """A walk of `steps` from unit normal noise [B, C, H, W]; its prompts stay the same to its end."""
        self.latents, self.index = self.schedule.first_latents(self.schedule.first_order(steps), noise), 0
        self.prompts = tuple(prompts)

    def advance_to(
        self, index: int, steps: int, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """(latents [B, C, H, W], their time [B]) before step `index` of `steps`, drawn without gradient. All ranks walk the same steps."""
        assert self.latents is not None and index >= self.index, "a walk begins before it goes on"
        sampler = self.schedule.first_order(steps)
        both = TextCond.cat([negative, cond])
        with torch.no_grad():
            for time in sampler.timesteps[self.index : index]:
                predicted = guided(denoiser, self.latents, time, both, guidance)
                self.latents = sampler.step(predicted, time, self.latents, return_dict=False)[0]
        self.index = index
        time = sampler.timesteps[index]
        return self.latents, time.to(self.latents.device).expand(len(self.latents))
