"""Stochastic rounding."""

from __future__ import annotations

import torch

from sculpt_dist.maths.rounding import round_to_bf16


def test_rounded_values_are_neighbours_in_bf16_and_keep_small_changes_on_average():
    rng = torch.Generator().manual_seed(0)
    values = torch.tensor([1.00001, -0.33334, 0.0, 3.0, 1e-30]).repeat(200_000, 1)
    rounded = round_to_bf16(values, torch.rand(values.shape, generator=rng))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert float((1.00001 - values.bfloat16().float().double().mean(0)[0]).abs()) > 5e-6  # what plain rounding loses
    torch.testing.assert_close(rounded.double().mean(0), values[0].double(), rtol=3e-6, atol=1e-12)
    assert all(len(column.unique()) <= 2 for column in rounded.T)
