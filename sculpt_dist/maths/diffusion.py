"""Noising and prediction targets of DDPM and of flow matching. Letters: B batch, C H W latent, T train timesteps."""

from __future__ import annotations

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


def shifted_sigma(uniform: Tensor, shift: float) -> Tensor:
    """s = k u / (1 + (k - 1) u), the time shift for higher resolutions (Esser et al., arXiv 2403.03206, eq. 23).

    u (`uniform`) and s are in [0, 1]; k is `shift`.
    """
    return shift * uniform / (1 + (shift - 1) * uniform)
