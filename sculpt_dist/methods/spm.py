"""One-dimensional adapter: a membrane of rank 1 that blocks the target, anchored all over text space.

Lyu et al., "One-dimensional Adapter to Rule Them All" (SPM), arXiv 2312.16145.

Let e be the student, e0 the model before this concept, x latents that the student draws for the target's prompt c, ""
the empty prompt, and a_i random conditions of about the length of c's (latent anchoring):

    L = MSE(e(x, c), e0(x, "") - eta (e0(x, c) - e0(x, ""))) + w MSE(e(x, a_i), e0(x, a_i))

Each concept has an adapter of rank 1 on every matrix of the transformer blocks; all are merged on export. A random
direction differs from any prompt, so that the paper's choice of anchors by distance from c accepts nearly all, and all
are taken here. `reference_compat` follows the published code, in which, by its layout, every other anchor is the empty
prompt. The paper also scales the adapter by a prompt's likeness to the target when an image is drawn; merged, it always
acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses, TextCond
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse, negative_guidance
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Request, Step, matrices

SPREAD = 0.2  # lengths of anchors are 1 - SPREAD to 1 + SPREAD times the prompt's


@dataclass(frozen=True)
class Config:
    """The options of spm."""

    name: str = "spm"
    """Name of this method."""
    rank: int = 1
    """Rank of each concept's adapter."""
    eta: float = 1.0
    """Strength of the negative guidance."""
    anchors: int = 4
    """Random conditions for each sample."""
    anchor_weight: float = 1000.0
    """Weight of the anchoring, w."""
    guidance: float = 3.0
    """Guidance scale with which the student draws its latents."""
    sampler_steps: int = 30
    """Sampler steps of these latents."""
    reference_compat: bool = False
    """Let every other anchor be the empty prompt, as the published code does."""


class Method(Base):
    """Trains an adapter on the matrices of the transformer blocks; needs no stored samples."""

    rank_per_concept = True

    def __init__(self, config: Config) -> None:
        for option in ("rank", "anchors", "sampler_steps"):
            if getattr(config, option) < 1:
                raise ConfigError(f"method.{option}={getattr(config, option)}: must be at least 1")
        self.config = config

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target", latents=False),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, "transformer")

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
        layers = [name.removesuffix(".weight") for name in self.trainable(groups)]
        return {"r": self.config.rank, "lora_alpha": self.config.rank, "target_modules": layers}

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        config, cond = self.config, step.batch.target.cond
        index = int(step.rng.shared("index") * config.sampler_steps)
        prompts = step.batch.target.prompts
        latents, time = step.fresh_latents(index, config.sampler_steps, config.guidance, prompts, cond)
        empty_cond = step.empty(len(cond))
        anchored: list[Request] = [(latents, time, self._anchor(step, i, cond)) for i in range(config.anchors)]
        if config.reference_compat:
            anchored[::2] = [(latents, time, empty_cond)] * len(anchored[::2])
        empty, with_prompt, *before = step.frozen("teacher").all(
            [(latents, time, empty_cond), (latents, time, cond), *anchored]
        )
        forgets, *after = step.student.all([(latents, time, cond), *anchored])
        return Losses(
            {
                "forget": mse(forgets, negative_guidance(empty, with_prompt, config.eta)),
                "anchor": config.anchor_weight * mse(torch.cat(after), torch.cat(before)),
            }
        )

    def _anchor(self, step: Step, number: int, cond: TextCond) -> TextCond:
        """A random condition in place of each prompt's, of about the same length."""
        scale = 1 + SPREAD * (2 * step.rng.uniform(f"anchor length {number}") - 1)  # [B]

        def like(values: Tensor, what: str) -> Tensor:
            return scaled_noise(step.rng.normal(f"anchor {what} {number}", values.shape[1:]), values, scale)

        pooled = None if cond.pooled is None else like(cond.pooled, "pooled")
        return replace(cond, tokens=like(cond.tokens, "tokens"), pooled=pooled)


def scaled_noise(noise: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """The noise [B, ...] with `scale` [B] times the norm that each sample of `values` [B, ...] has."""
    lengths, wanted = (one.float().flatten(1).norm(dim=1) for one in (noise, values))
    factor: Tensor = (scale * wanted / lengths).view(-1, *[1] * (noise.dim() - 1))
    return (noise * factor).to(values.dtype)
