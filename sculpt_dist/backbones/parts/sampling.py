"""Drawing: from noise to latents with the pipeline's own sampler, and from decoded pixels to images."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.backbones.parts.guidance import Guided
from sculpt_dist.backbones.parts.schedules import Schedule
from sculpt_dist.core.errors import NonFiniteError


def sampled_latents(schedule: Schedule, predict: Guided, noise: Tensor, steps: int) -> Tensor:
    """Unit noise [B, C, H, W] -> clean latents [B, C, H, W], without gradient; equal noise gives equal latents."""
    sampler = schedule.sampler(steps)
    latents = schedule.first_latents(sampler, noise)
    with torch.no_grad():
        for time in sampler.timesteps:
            predicted = predict(schedule.model_input(sampler, latents, time), time)
            latents = sampler.step(predicted, time, latents, return_dict=False)[0]
    return latents


def images_of(pixels: Tensor, latents: Tensor) -> Tensor:
    """[B, 3, h, w] in about [-1, 1], decoded from the latents -> uint8 of the same shape.

    Raises NonFiniteError: a cast would turn what is not finite into black.
    """
    if pixels.device.type != "meta" and not bool(pixels.isfinite().all()):
        if bool(latents.isfinite().all()):
            raise NonFiniteError(
                f"the autoencoder decodes values that are not finite, in {pixels.dtype}: set model.vae_dtype=float32"
            )
        raise NonFiniteError(
            "the net draws values that are not finite: choose a lower guidance, or a model.dtype with a wider range"
        )
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
