"""The formulas of Safe Latent Diffusion (Schramowski et al., arXiv 2211.05105).

e_u, e_c and e_S are the denoiser's predictions for no prompt, the prompt and the concept to avoid, [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor


def safety_scale(conditioned: Tensor, concept: Tensor, scale: float, threshold: float) -> Tensor:
    """mu, elementwise: min(1, |s (e_c - e_S)|) where e_c - e_S < threshold, else 0.

    The paper prints max(1, |...|); its text and its code bound the scale by 1.
    """
    difference = conditioned - concept
    bounded = (scale * difference).abs().clamp(max=1.0)
    return torch.where(difference < threshold, bounded, torch.zeros_like(bounded))


def safety_term(
    plain: Tensor, conditioned: Tensor, concept: Tensor, scale: float, threshold: float, momentum: Tensor, weight: float
) -> Tensor:
    """gamma, with momentum: mu (e_S - e_u) + s_m nu; it is subtracted from e_c - e_u."""
    return safety_scale(conditioned, concept, scale, threshold) * (concept - plain) + weight * momentum
