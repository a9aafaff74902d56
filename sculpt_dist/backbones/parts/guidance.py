"""Guided prediction: how the denoiser's answers for a prompt and for a negative prompt become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sculpt_dist.core.types import Denoiser, TextCond

Guided = Callable[[Tensor, Tensor], Tensor]  # (latents [B, C, H, W], time []) -> prediction [B, C, H, W]


def classifier_free(denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float) -> Guided:
    """e(x, n) + g (e(x, c) - e(x, n)), both answers from one forward (Ho and Salimans, arXiv 2207.12598, eq. 6).

    There the weight is w = g - 1, and n is the empty prompt.
    """
    both = TextCond.cat([negative, cond])  # [2 B, ...]

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        noisy = torch.cat([latents, latents])  # [2 B, C, H, W]
        without, with_prompt = denoiser(noisy, time.to(noisy).expand(len(noisy)), both).chunk(2)
        return without + guidance * (with_prompt - without)

    return predict
