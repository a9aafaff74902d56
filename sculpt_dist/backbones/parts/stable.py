"""What Stable Diffusion and SDXL share: the AutoencoderKL with the scaling that their denoisers expect, and small untrained parts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

LATENT_CHANNELS = 4  # of the small parts


def kl_encode(vae: Any, pixels: Tensor) -> Tensor:
    """[B, 3, h, w] in [-1, 1] -> the scaled mean latent [B, C, H, W], fp32."""
    with torch.no_grad():
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    offset, spread = _statistics(vae, mean)
    return (mean - offset) / spread


def kl_decode(vae: Any, latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3, h, w], about [-1, 1]."""
    offset, spread = _statistics(vae, latents)
    return vae.decode((latents * spread + offset).to(vae.dtype)).sample


def kl_autoencode(vae: Any, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, h, w] decoded from a draw of the posterior, and its weighted divergence [] from the unit normal."""
    posterior = vae.encode(pixels).latent_dist
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return vae.decode(posterior.sample(generator=rng)).sample, 5e-4 * divergence


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(offset, spread) of a raw latent, per channel where the autoencoder says so, else for all channels."""
    mean, std, scale = vae.config.get("latents_mean"), vae.config.get("latents_std"), vae.config.scaling_factor
    if mean is None or std is None:
        return 0.0, 1 / scale
    offset, spread = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
    return offset, spread / scale


def tiny_autoencoder() -> AutoencoderKL:
    """Untrained, for 32 x 32 images and 4 x 8 x 8 latents (0.23 M weights)."""
    channels = (16, 32, 32)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def tiny_unet(channels: tuple[int, int], text_width: int, **more: Any) -> UNet2DConditionModel:
    """Untrained, for 4 x 8 x 8 latents, with attention at 4 x 4 only."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
        **more,
    )


def tiny_scheduler() -> Any:
    """DPM-Solver++ on Stable Diffusion's noise schedule."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
