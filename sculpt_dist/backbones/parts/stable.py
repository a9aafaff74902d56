"""The autoencoder of Stable Diffusion and SDXL (AutoencoderKL), with the scaling that their denoisers expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    """(offset, spread) of a raw latent: per channel where the settings give both, else one for all channels."""
    mean, std, scale = vae.config.get("latents_mean"), vae.config.get("latents_std"), vae.config.scaling_factor
    if mean is None or std is None:
        return 0.0, 1 / scale
    offset, spread = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
    return offset, spread / scale
