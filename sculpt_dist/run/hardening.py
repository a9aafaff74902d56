"""Forgetting under attack: each update first looks for a disturbance of the prompts with which the concept comes back.

After AdvUnlearn (arXiv 2405.15234), which attacks the token embeddings under ESD's loss. Here any method that trains on
samples of the target is attacked, and the disturbance d is one of what the denoiser reads, which holds all that a text
encoder could give, and more (our own):

    d = argmin MSE(e(x_t, c + d), goal)  over  |d| <= r |c|  for every token,    then  L of the method at  c + d

e is the student, x_t a noisy image of the target. The inner minimum is sought by steps along the normalised gradient,
which start at 0 and stay within the radius. `share` of the samples are attacked; the others keep their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sculpt_dist.config.schema import AdversarialConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, Losses, TextCond
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import LossFunction, Method, Step
from sculpt_dist.run.wrapped import Wrapped


class Hardened(Wrapped):
    """A method whose losses see some of the target's prompts disturbed."""

    def __init__(self, method: Method, settings: AdversarialConfig) -> None:
        """Raises ConfigError for a method that trains on no sample of the target."""
        super().__init__(method)
        self.settings = settings
        if not any(spec.role == "target" and spec.latents for spec in method.streams()):
            raise ConfigError(
                "adversarial.steps: this method trains on no sample of the target, so nothing can be attacked; set it "
                "to 0, or choose another method"
            )

    def again(self, method: Method) -> Method:
        return Hardened(method, self.settings)

    def loss_groups(self) -> Sequence[LossFunction]:
        return [_at_disturbed(group, self) for group in self.method.loss_groups()]

    def losses(self, step: Step) -> Losses:
        return self.method.losses(self.attacked(step))

    def attacked(self, step: Step) -> Step:
        """The step with the target's prompts disturbed, some of them."""
        target = step.batch.target
        time = step.backbone.sample_time(step.rng.uniform("adversarial time"))  # [B]
        noisy, goal = step.corrupted(target, time, "adversarial")
        disturbed = disturbance(step, noisy, time, goal, self.settings)
        chosen = step.rng.uniform("adversarial").to(noisy.device) < self.settings.share  # [B]
        cond = disturbed.where(chosen, target.cond)
        streams = {**step.batch.streams, "target": replace(target, cond=cond)}
        return replace(step, batch=ConceptBatch(streams))


def _at_disturbed(group: LossFunction, hardened: Hardened) -> LossFunction:
    return lambda step: group(hardened.attacked(step))


def disturbance(step: Step, noisy: Tensor, time: Tensor, goal: Tensor, settings: AdversarialConfig) -> TextCond:
    """The target's condition, disturbed so that the student predicts the noise of its image well."""
    cond = step.batch.target.cond
    fixed = [value.detach() for value in (cond.tokens, cond.pooled) if value is not None]
    reach = [settings.radius * value.float().norm(dim=-1, keepdim=True) for value in fixed]  # [B, L, 1] and [B, 1]
    moved = [torch.zeros_like(value) for value in fixed]
    for _ in range(settings.steps):
        moved = [delta.requires_grad_() for delta in moved]
        loss = mse(step.student.for_inputs(noisy, time, _disturbed(cond, moved)), goal)
        gradients = torch.autograd.grad(loss, moved)
        moved = [
            _within(delta.detach() - settings.lr * limit * _unit(gradient), limit)
            for delta, limit, gradient in zip(moved, reach, gradients)
        ]
    return _disturbed(cond, moved)


def _disturbed(cond: TextCond, moved: Sequence[Tensor]) -> TextCond:
    tokens = cond.tokens + moved[0].to(cond.tokens)
    return replace(cond, tokens=tokens, pooled=None if cond.pooled is None else cond.pooled + moved[1].to(cond.pooled))


def _unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-20)


def _within(delta: Tensor, limit: Tensor) -> Tensor:
    """The delta with every row no longer than its limit."""
    return delta * (limit / delta.norm(dim=-1, keepdim=True).clamp(min=1e-20)).clamp(max=1)
