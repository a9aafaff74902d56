"""The masked step against torch's AdamW, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sculpt_dist.engine.masking import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer import MaskedAdamW, Pull, ShardedVector
from sculpt_dist.engine.sharding import Fragment, Shard


def build(n: int = 6, decay: float = 0.0, clip: float = 0.0) -> tuple[MaskedAdamW, Shard, DynamicMask]:
    weights = torch.nn.Parameter(torch.linspace(-1, 1, n))
    optimizer = MaskedAdamW([weights], (0.9, 0.999), decay, clip)
    shard = Shard(weights, [Fragment("w", 0, 0, 0, n)])
    mask = DynamicMask([shard], {"w": n}, None, MaskSettings(0.5, "matrix", "abs_sum", 0))
    optimizer.attach([shard], mask, None)
    optimizer.param_groups[0]["lr"] = 0.1
    return optimizer, shard, mask


def update(optimizer: MaskedAdamW, shard: Shard, gradient: torch.Tensor, phase: str = "train") -> None:
    optimizer.phase = phase
    shard.master.grad = gradient.clone()
    optimizer.step()


def gradients(steps: int, n: int = 6) -> torch.Tensor:
    return torch.randn(steps, n, generator=torch.Generator().manual_seed(0))


def test_all_open_equals_torch_adamw():
    optimizer, shard, _ = build(decay=0.1)
    reference = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    adamw = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.1)
    for gradient in gradients(7):
        update(optimizer, shard, gradient)
        reference.grad = gradient.clone()
        adamw.step()
    torch.testing.assert_close(shard.master.data, reference.data)


def test_collecting_moves_nothing_and_sums_signed_gradients():
    optimizer, shard, _ = build()
    before = shard.master.detach().clone()
    for gradient in gradients(3):
        update(optimizer, shard, gradient, "collect")
    assert torch.equal(shard.master, before) and not shard.moments.momentum.any()
    torch.testing.assert_close(shard.saliency, gradients(3).sum(0))


def test_closed_weights_do_not_move_with_decay_momentum_and_clipping():
    optimizer, shard, mask = build(decay=0.5, clip=0.1)
    for gradient in gradients(3):
        update(optimizer, shard, gradient)
    shard.saliency.copy_(torch.arange(6).float())
    mask.build()
    shard.moments.momentum[:3] = shard.moments.variance[:3] = 0  # as a turnover does
    before = shard.master.detach().clone()
    for gradient in gradients(9)[3:]:
        update(optimizer, shard, gradient)
    assert torch.equal(shard.master[:3], before[:3]) and (shard.master[3:] != before[3:]).all()


def test_norm_and_clipping_use_the_masked_gradient_and_saliency_the_raw_one():
    optimizer, shard, mask = build(clip=1.0)
    shard.saliency.copy_(torch.arange(6).float())
    mask.build()
    update(optimizer, shard, torch.tensor([100.0, 100, 100, 3, 4, 0]))
    assert optimizer.grad_norm == pytest.approx(5.0)
    assert shard.saliency.tolist() == [100, 100, 100, 3, 4, 0]
    assert shard.moments.momentum.tolist() == pytest.approx([0, 0, 0, 0.06, 0.08, 0], rel=1e-4)


def test_closed_weights_keep_moving_in_the_published_form():
    optimizer, shard, mask = build()
    mask.settings = MaskSettings(0.5, "matrix", "abs_sum", 0, resets_moments=False)
    for gradient in gradients(5):
        update(optimizer, shard, gradient)
    shard.saliency.copy_(torch.arange(6).float())
    mask.build()
    before = shard.master.detach().clone()
    update(optimizer, shard, torch.ones(6))
    assert (shard.master.detach()[:3] != before[:3]).all()


def test_first_step_of_a_weight_opened_late_is_the_learning_rate():
    optimizer, shard, mask = build()
    shard.saliency.copy_(torch.arange(6).float())
    mask.build()
    for gradient in gradients(20):
        update(optimizer, shard, gradient)
    shard.saliency.copy_(torch.tensor([9.0, 0, 0, 1, 2, 3]))
    mask.turn_over(0.34, optimizer.updates)
    assert shard.opened.tolist() == [2, 0, 0, 0, 1, 1]
    before = shard.master.detach().clone()
    update(optimizer, shard, torch.full((6,), 1e-3))
    assert float(before[0] - shard.master.detach()[0]) == pytest.approx(0.1, rel=1e-4)


def test_the_pull_adds_the_gradient_of_l1sp_and_l2sp_and_is_no_saliency():
    optimizer, shard, mask = build()
    optimizer.pull = Pull([shard.flat.clone()], l1=0.5, l2=2.0)
    shard.flat.add_(torch.tensor([0.5, -0.25, 0.0, 0.0, 1.0, 0.0]))  # moved since
    seen: list[list[float]] = []
    train = optimizer._train
    optimizer._train = lambda gradient, statistic: (
        seen.append(gradient.pieces[0].tolist()),
        train(gradient, statistic),
    )
    update(optimizer, shard, torch.ones(6))
    assert seen == [[1 + 1.0 + 0.5, 1 - 0.5 - 0.5, 1.0, 1.0, 1 + 2.0 + 0.5, 1.0]]
    assert shard.saliency.tolist() == [1.0] * 6
    kept = shard.opened.clone()
    mask.build()
    before = shard.flat.clone()
    update(optimizer, shard, torch.zeros(6))
    closed = shard.opened == 0
    assert closed.any() and kept.all() and torch.equal(shard.flat[closed], before[closed])


def test_a_non_finite_gradient_has_a_non_finite_norm_and_with_clipping_moves_nothing():
    optimizer, shard, _ = build(clip=1.0)
    before = shard.master.detach().clone()
    update(optimizer, shard, torch.tensor([math.nan, 1, 1, 1, 1, 1]))
    assert math.isnan(optimizer.grad_norm)
    assert torch.equal(shard.master, before) and not shard.moments.momentum.any()
    optimizer, shard, _ = build()
    update(optimizer, shard, torch.tensor([math.inf, 1, 1, 1, 1, 1]))
    assert math.isinf(optimizer.grad_norm)


def test_captured_groups_are_combined_by_the_rule():
    optimizer, shard, _ = build()
    seen = []

    def orthogonal(parts: list[ShardedVector]) -> ShardedVector:
        forget, retain = parts
        seen.append(forget.dot(retain))
        return forget.plus(retain, -forget.dot(retain) / retain.dot(retain))

    optimizer.combine = orthogonal
    update(optimizer, shard, torch.tensor([1.0, 1, 0, 0, 0, 0]), "capture")
    update(optimizer, shard, torch.tensor([-1.0, 0, 0, 0, 0, 0]), "train")
    assert seen == [-1.0]
    assert shard.moments.momentum.tolist() == pytest.approx([0, 0.1, 0, 0, 0, 0])
