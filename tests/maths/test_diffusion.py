"""Solving noisy latents for what they were made of, and the noise of ancestral sampling."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.maths.diffusion import ancestral_sigma, clean_and_noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_clean_and_noise_come_back_from_what_a_perfect_net_predicts(kind):
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha = torch.tensor([0.6, 0.25])
    sigma = 1 - alpha if kind == "flow_prediction" else (1 - alpha**2).sqrt()
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    predicted = {"epsilon": noise, "v_prediction": a * noise - s * clean, "flow_prediction": noise - clean}[kind]
    found = clean_and_noise(a * clean + s * noise, predicted, kind, alpha, sigma)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, (clean, noise)))


def test_the_noise_of_an_ancestral_step_is_that_of_ddim():
    # alpha_bar .25 -> .64: sqrt((1 - .64) / (1 - .25)) sqrt(1 - .25 / .64), Song et al., eq. 16 at eta = 1
    alphas = torch.tensor([0.25, 0.64])
    (a, b), (s, t) = alphas.sqrt(), (1 - alphas).sqrt()
    assert float(ancestral_sigma(a, s, b, t)) == pytest.approx((0.36 / 0.75) ** 0.5 * (1 - 0.25 / 0.64) ** 0.5)
    # flow from sigma .5 to .25: .25 / .5 sqrt(.5^2 - (.5 / .75)^2 .25^2)
    half, quarter = torch.tensor(0.5), torch.tensor(0.25)
    by_hand = 0.5 * (0.25 - (2 / 3) ** 2 * 0.0625) ** 0.5
    assert float(ancestral_sigma(half, half, 1 - quarter, quarter)) == pytest.approx(by_hand)
    assert float(ancestral_sigma(a, s, torch.tensor(1.0), torch.tensor(0.0))) == 0  # nothing is added to a clean image
