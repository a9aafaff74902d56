"""Exact selection against a full sort, in one process; test_engine covers several ranks."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.engine.masking import DynamicMask, MaskSettings, Part, choose, chosen, quantiles
from sculpt_dist.engine.sharding import Fragment, Shard, shards
from sculpt_dist.maths.saliency import accumulate, sort_keys


def selected_by_sorting(keys: torch.Tensor, among: torch.Tensor, count: int, largest: bool) -> torch.Tensor:
    """The `count` largest or smallest keys of those in `among`, ties by position."""
    order = torch.sort(keys, descending=largest, stable=True).indices
    picked = torch.zeros(len(keys), dtype=torch.bool)
    picked[order[among[order]][:count]] = True
    return picked


def part_of(keys: torch.Tensor, opened: torch.Tensor, slot: int) -> Part:
    return Part(lambda here: keys[here].int(), opened.to(torch.uint8), slot)


def swapped(
    parts: list[Part], segments: list[int], closing: list[int], opening: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    choice = choose(parts, *(torch.tensor(numbers) for numbers in (segments, closing, opening)), None)
    found = []
    for part, cut in zip(parts, choice.cuts):
        pieces = [(closes.bool(), opens.bool()) for _, closes, opens in chosen(part, cut)]
        found.append(tuple(torch.cat(side) for side in zip(*pieces)))
    return found


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("spread", [1, 5, 1000, 2**31 - 2**23 - 1])
@pytest.mark.parametrize("count", [0, 1, 37, 80])
def test_choice_equals_a_stable_sort(monkeypatch, spread, count, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    rng = torch.Generator().manual_seed(spread)
    keys, opened = torch.randint(0, spread, (200,), generator=rng), torch.rand(200, generator=rng) < 0.5
    ((close, opens),) = swapped([part_of(keys, opened, 0)], [0], [count], [count // 2])
    assert torch.equal(close, selected_by_sorting(keys, opened, count, largest=False))
    assert torch.equal(opens, selected_by_sorting(keys, ~opened, count // 2, largest=True))


def test_segments_are_independent():
    opened = torch.tensor([False] * 4)
    parts = [part_of(torch.tensor([5, 5, 5, 9]), opened, 0), part_of(torch.tensor([0, 0, 7, 0]), opened, 1)]
    (_, first), (_, second) = swapped(parts, [0, 1], [0, 0], [2, 3])
    assert first.tolist() == [True, False, False, True]
    assert second.tolist() == [True, True, True, False]


def test_ties_in_a_global_segment_go_to_the_first_parameter():
    closed = torch.tensor([False, False])
    parts = [part_of(torch.tensor([3, 3]), closed, 1), part_of(torch.tensor([3, 3]), closed, 0)]
    (_, last), (_, first) = swapped(parts, [0, 0], [0], [3])
    assert last.tolist() == [True, False] and first.tolist() == [True, True]


def test_asking_for_more_weights_than_candidates_fails_an_assertion():
    with pytest.raises(AssertionError, match="more weights"):
        swapped([part_of(torch.tensor([1, 4]), torch.tensor([True, False]), 0)], [0], [0], [2])


def test_quantiles_are_at_most_an_eighth_too_low():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) ** 5
    part = Part(lambda here: sort_keys(values[here]), torch.zeros(len(values), dtype=torch.uint8), 0)
    choice = choose([part], *(torch.tensor([number]) for number in (0, 0, 1)), None)
    for share, found in quantiles(choice.histogram, (0.0, 0.1, 0.5, 0.99, 1.0)).items():
        true = float(values.abs().double().quantile(share, interpolation="lower"))
        assert 0 <= true - found <= true / 8, share


def test_keys_sort_like_magnitudes():
    values = torch.tensor([0.0, -0.0, 1e-45, -3.0, 2.5, 1e30, -1e-8])
    assert torch.equal(sort_keys(values).argsort(stable=True), values.abs().argsort(stable=True))
    assert sort_keys(values)[0] == sort_keys(values)[1] == 0


@pytest.mark.parametrize(
    ("statistic", "expected"), [("abs_sum", [0.0, 4.0]), ("sum_abs", [2.0, 4.0]), ("sum_sq", [2.0, 10.0])]
)
def test_saliency_statistics_by_hand(statistic, expected):
    saliency = torch.zeros(2)
    for gradient in ([1.0, 1.0], [-1.0, 3.0]):
        accumulate(saliency, torch.tensor(gradient), statistic)
    assert saliency.tolist() == expected


def small_mask(**settings) -> tuple[DynamicMask, Shard]:
    master = torch.zeros(20, requires_grad=True)
    shard = Shard(master, [Fragment("a", 0, 0, 0, 12), Fragment("b", 1, 0, 12, 8)])
    mask = DynamicMask(
        [shard],
        {"a": 12, "b": 8},
        None,
        MaskSettings(**({"keep": 0.5, "scope": "matrix", "saliency": "abs_sum", "seed": 0} | settings)),
    )
    shard.saliency.copy_(torch.tensor([1.0, -9, 2, 8, 3, 7, -4, 6, 5, 10, 0, 0, 1, 2, 3, 4, -5, -6, -7, -8]))
    return mask, shard


def test_mask_opens_the_largest_magnitudes_of_each_matrix():
    mask, shard = small_mask()
    mask.build()
    assert shard.opened.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert not shard.saliency.any()


def test_global_scope_ranks_all_matrices_together():
    mask, shard = small_mask(scope="global", keep=0.2)
    mask.build()
    assert shard.opened.nonzero().flatten().tolist() == [1, 3, 9, 19]


def test_turnover_swaps_the_least_for_the_most_salient_and_zeroes_their_moments():
    mask, shard = small_mask()
    mask.build()
    shard.moments.momentum.fill_(1.0)
    shard.moments.variance.fill_(1.0)
    shard.saliency.copy_(torch.arange(20).float())
    mask.turn_over(0.34, updates_done=5)  # 2 of 6 open, 1 of 4 open
    assert shard.opened[:12].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 2, 2]  # 1 and 3 closed, 10 and 11 opened
    assert shard.opened[12:].tolist() == [0, 0, 0, 2, 0, 1, 1, 1]  # 16 closed, 15 opened
    assert (shard.moments.momentum == 0).nonzero().flatten().tolist() == [1, 3, 10, 11, 15, 16]
    assert mask.births == [0, 0, 5] and mask.swapped == 3 and mask.num_open() == mask.open_count == 10
    assert mask.overlap == pytest.approx(0.7)


def test_keep_1_opens_everything():
    mask, shard = small_mask(keep=1.0)
    mask.build()
    assert shard.opened.all()


def test_turnover_as_published_keeps_moments_and_the_first_generation():
    mask, shard = small_mask(resets_moments=False)
    mask.build()
    shard.moments.momentum.fill_(1.0)
    shard.saliency.copy_(torch.arange(20).float())
    mask.turn_over(0.34, updates_done=5)
    assert shard.moments.momentum.all() and mask.births == [0, 0] and shard.opened[10] == 1


def test_random_masks_differ_between_concepts():
    mask, shard = small_mask(saliency="random")
    mask.build()
    first = shard.opened.clone()
    mask.concept, mask.selections = 1, 0
    mask.build()
    assert not torch.equal(first, shard.opened)


def test_non_finite_saliency_makes_no_mask():
    mask, shard = small_mask()
    shard.saliency[3] = float("nan")
    with pytest.raises(NonFiniteError, match="collected"):
        mask.build()


def test_random_mask_depends_only_on_seed_and_position():
    first, second, other = (small_mask(saliency="random", seed=s) for s in (3, 3, 4))
    for mask, _ in (first, second, other):
        mask.build()
    assert torch.equal(first[1].opened, second[1].opened) and not torch.equal(first[1].opened, other[1].opened)
