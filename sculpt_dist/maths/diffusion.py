"""Noising and prediction targets of DDPM and of flow matching. Letters: B batch, C H W latent, T train timesteps."""

from __future__ import annotations

import torch
from torch import Tensor


def ddpm_corrupt(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(a) x + sqrt(1 - a) n, with a = alpha_bar [B] at each sample's time (Ho et al., arXiv 2006.11239,
    eq. 4).
    """
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def ddpm_velocity(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = sqrt(a) n - sqrt(1 - a) x (Salimans and Ho, arXiv 2202.00512, section 2.4)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def flow_corrupt(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s = (1 - s) x + s n, with s = sigma [B] (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003)."""
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * clean + s * noise


def flow_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """dx_s / ds = n - x, constant in time."""
    return noise - clean


def clean_and_noise(noisy: Tensor, predicted: Tensor, kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Solve x_t = alpha x + sigma n and the prediction for (x, n), all [B, C, H, W].

    `kind`: epsilon (n), v_prediction (alpha n - sigma x, where alpha^2 + sigma^2 = 1) or flow_prediction (n - x, where
    alpha + sigma = 1). `alpha`, `sigma`: [B], alpha > 0.
    """
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    if kind == "epsilon":
        return (noisy - s * predicted) / a, predicted
    if kind == "v_prediction":
        return a * noisy - s * predicted, s * noisy + a * predicted
    return noisy - s * predicted, noisy + a * predicted


def ancestral_sigma(alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor) -> Tensor:
    """The deviation of the noise that a step of ancestral sampling adds, which is DDIM's at eta = 1; any shape.

    s^2 = sigma'^2 / sigma^2 (sigma^2 - (alpha / alpha')^2 sigma'^2), the variance of the posterior (Ho et al., arXiv
    2006.11239, eq. 7; Song et al., arXiv 2010.02502, eq. 16).
    """
    spread = sigma**2 - (alpha / next_alpha) ** 2 * next_sigma**2
    return next_sigma / sigma * spread.clamp(min=0).sqrt()


def shifted_sigma(uniform: Tensor, shift: float) -> Tensor:
    """s = k u / (1 + (k - 1) u), the time shift for higher resolutions (Esser et al., arXiv 2403.03206, eq. 23).

    u (`uniform`) and s are in [0, 1]; k is `shift`.
    """
    return shift * uniform / (1 + (shift - 1) * uniform)


def focal_shares(uniform: Tensor, focus: tuple[float, float], ramp: float) -> Tensor:
    """Uniform numbers [B] in [0, 1) -> shares of the schedule [B] that gather between the two of `focus`.

    Their density is s(k (t - a)) - s(k (t - b)) up to a factor, with s a sigmoid and k the `ramp` (Lu et al., arXiv
    2403.06135, eq. 5); on a grid of 1000.
    """
    grid = (torch.arange(1000) + 0.5) / 1000
    density = torch.sigmoid(ramp * (grid - focus[0])) - torch.sigmoid(ramp * (grid - focus[1]))
    passed = (density.cumsum(0) / density.sum()).to(uniform.device)
    return ((torch.searchsorted(passed, uniform.contiguous()).clamp(max=999) + 0.5) / 1000).to(uniform)
