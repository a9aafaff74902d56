"""DoCo: a discriminator makes the target's prompt draw what the superclass's does (Wu et al., arXiv 2405.15304).

Let e be the student, e0 the model before this concept, x_s a noisy sample of the superclass, c_f and c_s the prompts of
target and superclass, X(e) the clean latent that a prediction stands for, and D a discriminator of such latents:

    D:  BCE(D(X(e0(x_s, c_s))), 0) + BCE(D(X(e(x_s, c_f))), 1)        net:  L_a = BCE(D(X(e(x_s, c_f))), 0)
    L_b = MSE(e(x_s, c_s), goal_s)

D trains alone at first (`warmup`), while the net and its moments stay as they are. The gradients g_a of L_a and g_b of
L_b are each clipped to norm 1. Then, in each matrix, if cos(g_a, g_b) < 0 there, g_a loses what speaks against g_b, and
the net follows g_a alone:

    g_a - l cos(g_a, g_b) g_b / |g_b|

which is the projection where |g_a| = 1 there, and goes beyond it where |g_a| is smaller. D is the published PatchGAN
with group norms in place of batch norms, so that any number of ranks agrees (ours), and with fewer layers for small
latents. Inner products cover the shards of all ranks. In the published code the net's gradient also leaks into D's
update; that is not reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.engine.companion import Companion
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import LossFunction, Setup, Step, matrices
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.parts.terms import denoised_superclass

BETAS = (0.5, 0.999)  # of the discriminator's Adam


@dataclass(frozen=True)
class Config:
    """The options of doco."""

    name: str = "doco"
    """Name of this method."""
    warmup: float = 0.5
    """Share of the updates, the first ones, in which the discriminator trains alone."""
    discriminator_lr: float = 5e-4
    """Learning rate of the discriminator: 5e-4 for styles, 1e-4 for objects and nudity."""
    width: int = 64
    """Channels of the discriminator's first layer."""
    surgery: float = 1.0
    """Strength of the gradient surgery, l; 0 leaves g_a as it is."""
    parts: list[str] = field(default_factory=lambda: ["k", "v"])
    """Matrices of the cross-attention that train: any of q, k, v, out."""


class Method(Base):
    """Trains matrices of the cross-attention; draws no samples of the target."""

    def __init__(self, config: Config, companion: Companion | None = None) -> None:
        if not config.parts or set(config.parts) - {"q", "k", "v", "out"}:
            raise ConfigError(f"method.parts={list(config.parts)}: choose from q, k, v, out")
        if config.width < 1:
            raise ConfigError(f"method.width={config.width}: must be at least 1")
        if not 0 <= config.warmup < 1:
            raise ConfigError(f"method.warmup={config.warmup}: must be at least 0 and below 1")
        self.config, self.companion = config, companion

    def prepare(self, setup: Setup) -> Method:
        channels, size, _ = setup.backbone.latent_shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(setup.seed, "discriminator", setup.concept))
            net = discriminator(channels, size, self.config.width).to(setup.backbone.device)
        return Method(self.config, Companion(net, self.config.discriminator_lr, BETAS, setup.group))

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("superclass"),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return [name for part in self.config.parts for name in matrices(groups, f"cross_attention.{part}")]

    def saliency(self, step: Step) -> Losses:
        wanted, drawn = self._latents(step)
        return Losses({"saliency": mse(drawn, wanted)})

    def losses(self, step: Step) -> Losses:
        return Losses({**self.forget(step).terms, **self.retain(step).terms})

    def loss_groups(self) -> Sequence[LossFunction]:
        return (self.retain, self.forget)  # what `hold` adds to the last one is descended

    def alone(self, progress: float) -> LossFunction | None:
        return self.discriminate if progress < self.config.warmup else None

    def discriminate(self, step: Step) -> Losses:
        with torch.no_grad():
            wanted, drawn = self._latents(step)
        return self._judged(wanted, drawn)

    def forget(self, step: Step) -> Losses:
        assert self.companion is not None, "prepare() makes it"
        wanted, drawn = self._latents(step)
        terms = self._judged(wanted, drawn.detach()).terms
        return Losses({"forget": _verdict(self.companion.net(drawn), 0.0), **terms})

    def _judged(self, wanted: Tensor, drawn: Tensor) -> Losses:
        """The discriminator's own loss on two [B, C, H, W] without gradient, from which it learns."""
        assert self.companion is not None, "prepare() makes it"
        judge = self.companion.net
        mistakes = _verdict(judge(wanted), 0.0) + _verdict(judge(drawn), 1.0)
        self.companion.learn(mistakes)
        return Losses({"discriminator": mistakes.detach()})

    def retain(self, step: Step) -> Losses:
        return Losses({"retain": denoised_superclass(step)})

    def combine(self, gradients: Sequence[ShardedVector]) -> ShardedVector:
        retain, forget = (_clipped(gradient) for gradient in gradients)
        along, length_a, length_b = forget.dots(retain), forget.dots(forget).sqrt(), retain.dots(retain).sqrt()
        return forget.plus_each(retain, surgery(along, length_a, length_b, self.config.surgery))

    def _latents(self, step: Step) -> tuple[Tensor, Tensor]:
        """(X of the frozen net for the superclass's prompt, X of the student for the target's), [B, C, H, W] each."""
        superclass, backbone = step.batch.superclass, step.backbone
        time = backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, _ = step.corrupted(superclass, time, "superclass")
        wanted = step.frozen("teacher")(noisy, time, superclass.cond)
        drawn = step.student(noisy, time, step.batch.superclass_as_target)
        return backbone.predicted_clean(noisy, wanted, time), backbone.predicted_clean(noisy, drawn, time)


def surgery(along: Tensor, length_a: Tensor, length_b: Tensor, strength: float) -> Tensor:
    """The factor of g_b for every matrix, [n]: -l cos(g_a, g_b) / |g_b| where the cosine is negative, else 0.

    `along`: <g_a, g_b>; `length_a`, `length_b`: |g_a| and |g_b|.
    """
    cosine = along / (length_a * length_b).clamp(min=1e-30)
    return -strength * cosine.clamp(max=0) / length_b.clamp(min=1e-30)


def discriminator(channels: int, size: int, width: int) -> nn.Module:
    """Latents [B, C, size, size] -> one logit for each patch, [B, 1, h, w]: up to four layers that halve the size."""
    halvings = max(1, min(4, size.bit_length() - 2))
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, halvings):
        layers += [nn.Conv2d(width * 2 ** (i - 1), width * 2**i, 4, 2, 1, bias=False)]
        layers += [nn.GroupNorm(math.gcd(16, width), width * 2**i), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width * 2 ** (halvings - 1), 1, 4, 1, 1))


def _verdict(logits: Tensor, label: float) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def _clipped(gradient: ShardedVector) -> ShardedVector:
    """The gradient, its norm over all weights at most 1."""
    norm = gradient.dot(gradient) ** 0.5
    return gradient.plus(gradient, 1 / norm - 1) if norm > 1 else gradient
