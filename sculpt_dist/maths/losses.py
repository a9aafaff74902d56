"""Loss terms: tensors in, tensors out. Letters: B batch, C H W latent."""

from __future__ import annotations

from torch import Tensor


def mse(prediction: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error over all elements, in fp32: two [B, C, H, W] -> []."""
    return (prediction.float() - goal.float()).pow(2).mean()


def mse_each(prediction: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error of every sample, in fp32: two [B, C, H, W] -> [B]."""
    return (prediction.float() - goal.float()).pow(2).flatten(1).mean(1)


def negative_guidance(empty: Tensor, with_prompt: Tensor, scale: float | Tensor) -> Tensor:
    """e(x, "") - s (e(x, c) - e(x, "")), [B, C, H, W]: guides away from the prompt.

    Gandikota et al., arXiv 2303.07345, eq. 6.
    """
    return empty - scale * (with_prompt - empty)


def guided_label(superclass: Tensor, target: Tensor, guidance: float) -> Tensor:
    """The superclass prediction guided away from the target: s + w (s - f), [B, C, H, W].

    Ours, not in the Sculpting Memory paper: when the superclass prompt itself draws the target, the plain label s makes
    the model keep part of it. `guidance` w = 0 gives s.
    """
    return superclass + guidance * (superclass - target)
