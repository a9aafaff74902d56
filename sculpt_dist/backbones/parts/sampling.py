"""Drawing: from noise to latents with the pipeline's own sampler, and from decoded pixels to images."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.backbones.parts.guidance import Guided
from sculpt_dist.backbones.parts.schedules import Schedule


def sampled_latents(schedule: Schedule, predict: Guided, noise: Tensor, steps: int) -> Tensor:
    """Unit noise [B, C, H, W] -> clean latents [B, C, H, W], without gradient; equal noise gives equal latents."""
    sampler = schedule.sampler(steps)
    latents = schedule.first_latents(sampler, noise)
    with torch.no_grad():
        for time in sampler.timesteps:
            predicted = predict(schedule.model_input(sampler, latents, time), time)
            latents = sampler.step(predicted, time, latents, return_dict=False)[0]
    return latents


def images_of(pixels: Tensor) -> Tensor:
    """[B, 3, h, w] in about [-1, 1] -> uint8 of the same shape."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
