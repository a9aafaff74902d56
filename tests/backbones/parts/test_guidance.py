"""Guidance belongs to the backbone: sampling and trajectories use whatever `guided` says."""

from __future__ import annotations

import torch
from harness import PROJECT

from sculpt_dist.backbones.parts.guidance import classifier_free
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.core.types import TextCond

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"


class Unguided(Backbone):
    """A kind whose net needs no second prediction, as with embedded guidance."""

    def guided(self, denoiser, cond, negative, guidance):
        return lambda latents, time: denoiser(latents, time.expand(len(latents)), cond)


def condition(value: float) -> TextCond:
    return TextCond(torch.full((2, 1, 1), value))


def test_classifier_free_guidance_by_hand():
    """e(x, n) + g (e(x, c) - e(x, n)) with e(x, c) = x + c: 1 + 2 + 3 (5 - 2) = 12; one forward for both prompts."""
    sizes = []

    def denoiser(noisy, time, both):
        sizes.append((len(noisy), len(time), len(both)))
        return noisy + both.tokens.view(-1, 1, 1, 1)

    predict = classifier_free(denoiser, condition(5.0), condition(2.0), 3.0)
    assert predict(torch.ones(2, 1, 2, 2), torch.tensor(7)).unique().tolist() == [12.0]
    assert sizes == [(4, 4, 4)]


def test_a_kind_that_overrides_guided_is_sampled_and_walked_without_a_negative_prompt():
    backbone, sizes = Unguided(ASSETS, torch.float32, torch.device("cpu")), []

    def denoiser(noisy, time, cond):
        sizes.append(len(noisy))
        return 0.1 * noisy

    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    backbone.sample(denoiser, noise, condition(5.0), condition(2.0), 3, 7.5)
    trajectory = Trajectory(backbone)
    trajectory.begin(noise, ["a", "b"], 3)
    trajectory.advance_to(2, 3, denoiser, condition(5.0), condition(2.0), 7.5)
    assert sizes == [2] * 5
