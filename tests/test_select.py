"""Exact selection against a full sort, in one process; over ranks see test_engine."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.engine.mask import DynamicMask, MaskSettings
from sculpt_dist.engine.select import Candidates, choose_largest
from sculpt_dist.engine.shards import Fragment, Shard
from sculpt_dist.errors import NonFiniteError
from sculpt_dist.maths.saliency import accumulate, sort_keys


def by_sort(keys: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(keys, descending=True, stable=True).indices[:count]
    chosen = torch.zeros(len(keys), dtype=torch.bool)
    chosen[order] = True
    return chosen


@pytest.mark.parametrize("spread", [1, 5, 1000, 2**31 - 1])
@pytest.mark.parametrize("count", [0, 1, 37, 199, 200])
def test_choice_equals_a_stable_sort(spread, count):
    keys = torch.randint(0, spread, (200,), generator=torch.Generator().manual_seed(spread), dtype=torch.int64).int()
    (chosen,) = choose_largest([Candidates(keys, 0)], torch.tensor([0]), torch.tensor([count]), None)
    assert torch.equal(chosen, by_sort(keys, count))


def test_segments_are_independent_and_negative_keys_are_no_candidates():
    a, b = torch.tensor([5, -1, 5, 5, 9]).int(), torch.tensor([0, 0, -1, 0]).int()
    parts = [Candidates(a, 0), Candidates(b, 1)]
    chosen = choose_largest(parts, torch.tensor([0, 1]), torch.tensor([2, 2]), None)
    assert chosen[0].tolist() == [True, False, False, False, True]
    assert chosen[1].tolist() == [True, True, False, False]


def test_ties_in_a_global_segment_go_to_the_first_parameter():
    parts = [Candidates(torch.tensor([3, 3]).int(), 1), Candidates(torch.tensor([3, 3]).int(), 0)]
    chosen = choose_largest(parts, torch.tensor([0, 0]), torch.tensor([3]), None)
    assert chosen[0].tolist() == [True, False] and chosen[1].tolist() == [True, True]


def test_more_than_there_are_candidates_is_our_own_error():
    with pytest.raises(AssertionError, match="more weights"):
        choose_largest([Candidates(torch.tensor([1, -1]).int(), 0)], torch.tensor([0]), torch.tensor([2]), None)


def test_keys_sort_like_magnitudes():
    values = torch.tensor([0.0, -0.0, 1e-45, -3.0, 2.5, 1e30, -1e-8])
    assert torch.equal(sort_keys(values).argsort(stable=True), values.abs().argsort(stable=True))
    assert sort_keys(values)[0] == sort_keys(values)[1] == 0


@pytest.mark.parametrize(("statistic", "expected"), [("abs_sum", [0.0, 4.0]), ("sum_abs", [2.0, 4.0]), ("sum_sq", [2.0, 10.0])])
def test_saliency_statistics_by_hand(statistic, expected):
    saliency = torch.zeros(2)
    for gradient in ([1.0, 1.0], [-1.0, 3.0]):
        accumulate(saliency, torch.tensor(gradient), statistic)
    assert saliency.tolist() == expected


def small_mask(**settings) -> tuple[DynamicMask, Shard]:
    master = torch.zeros(20, requires_grad=True)
    shard = Shard(master, [Fragment("a", 0, 0, 0, 12), Fragment("b", 1, 0, 12, 8)])
    mask = DynamicMask([shard], {"a": 12, "b": 8}, None, MaskSettings(**({"keep": 0.5, "scope": "matrix", "saliency": "abs_sum", "seed": 0} | settings)))
    shard.saliency.copy_(torch.tensor([1.0, -9, 2, 8, 3, 7, -4, 6, 5, 10, 0, 0, 1, 2, 3, 4, -5, -6, -7, -8]))
    return mask, shard


def test_mask_opens_the_largest_magnitudes_of_each_matrix():
    mask, shard = small_mask()
    mask.build()
    assert shard.opened.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0] + [0, 0, 0, 0, 1, 1, 1, 1]
    assert not shard.saliency.any()


def test_global_scope_ranks_all_matrices_together():
    mask, shard = small_mask(scope="global", keep=0.2)
    mask.build()
    assert shard.opened.nonzero().flatten().tolist() == [1, 3, 9, 19]


def test_turnover_closes_the_least_and_opens_the_most_salient_and_clears_their_moments():
    mask, shard = small_mask()
    mask.build()
    shard.momentum.fill_(1.0)
    shard.variance.fill_(1.0)
    shard.saliency.copy_(torch.arange(20).float())
    mask.turn_over(0.34, updates_done=5)  # 2 of 6 open, 1 of 4 open
    assert shard.opened[:12].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 2, 2]  # 1 and 3 closed, 10 and 11 opened
    assert shard.opened[12:].tolist() == [0, 0, 0, 2, 0, 1, 1, 1]  # 16 closed, 15 opened
    assert (shard.momentum == 0).nonzero().flatten().tolist() == [1, 3, 10, 11, 15, 16]
    assert mask.births == [0, 0, 5] and mask.swapped == 3 and mask.num_open() == mask.open_count == 10
    assert mask.overlap == pytest.approx(0.7)


def test_keep_one_opens_everything():
    mask, shard = small_mask(keep=1.0)
    mask.build()
    assert shard.opened.all()


def test_published_turnover_keeps_moments_and_the_first_generation():
    mask, shard = small_mask(resets_moments=False)
    mask.build()
    shard.momentum.fill_(1.0)
    shard.saliency.copy_(torch.arange(20).float())
    mask.turn_over(0.34, updates_done=5)
    assert shard.momentum.all() and mask.births == [0, 0] and shard.opened[10] == 1


def test_random_turnover_draws_anew_and_every_concept_has_its_own_mask():
    mask, shard = small_mask(saliency="random")
    mask.build()
    first = shard.opened.clone()
    mask.concept, mask.selections = 1, 0
    mask.build()
    assert not torch.equal(first, shard.opened)


def test_saliency_that_is_not_finite_makes_no_mask():
    mask, shard = small_mask()
    shard.saliency[3] = float("nan")
    with pytest.raises(NonFiniteError, match="collected"):
        mask.build()


def test_random_mask_depends_on_seed_and_position_alone():
    first, second, other = (small_mask(saliency="random", seed=s) for s in (3, 3, 4))
    for mask, _ in (first, second, other):
        mask.build()
    assert torch.equal(first[1].opened, second[1].opened) and not torch.equal(first[1].opened, other[1].opened)
