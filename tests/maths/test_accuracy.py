"""Scores and formulas by hand."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from sculpt_dist.maths.accuracy import Answers, Target, bootstrap_intervals, unlearning_scores
from sculpt_dist.maths.diffusion import ddpm_corrupt, ddpm_velocity
from sculpt_dist.maths.losses import guided_label, mse
from sculpt_dist.maths.schedules import learning_rate_factor, one_cycle, turnover_count, turnover_share

CAT, DOG, CAR = 0, 1, 2


def answers(rows: list[tuple[int, int, int, int]], styles: bool = True) -> Answers:
    """From rows of (object requested, object seen, style requested, style seen)."""
    table = np.array(rows)
    return Answers(np.arange(len(rows)), table[:, 0], table[:, 2], table[:, 1], table[:, 3] if styles else None)


ROWS = [
    (CAT, DOG, 0, 0),  # forgotten, became a sibling
    (CAT, CAT, 1, 1),  # not forgotten
    (CAT, CAR, 0, 1),  # forgotten, no sibling; style lost
    (CAT, -1, 1, 1),  # forgotten, nothing recognised
    (DOG, DOG, 0, 0),
    (DOG, CAR, 1, 1),
    (CAR, CAR, 0, 0),
    (CAR, CAR, 1, 0),
]


def test_scores_of_an_object_by_hand():
    scores = unlearning_scores(answers(ROWS), [Target("object", CAT, (DOG,))])
    near_and_far = {"IRA_near": 0.5, "IRA_far": 1.0, "IRA_held": None}  # the dogs, and the cars
    assert scores == {"UA": 0.75, "IRA": 0.75, "CRA": 0.75, "SA": 0.25, "CTA": 0.75, **near_and_far}


def test_scores_of_a_style_by_hand():
    scores = unlearning_scores(answers(ROWS), [Target("style", 1, ())])
    missing = dict.fromkeys(("SA", "IRA_near", "IRA_far", "IRA_held"))
    assert scores == {"UA": 0.25, "IRA": 0.75, "CRA": 0.5, "CTA": 0.5, **missing}


def test_a_target_is_no_neighbour_of_another_target():
    scores = unlearning_scores(answers(ROWS), [Target("object", CAT, (DOG,)), Target("object", DOG, (CAT,))])
    assert scores["IRA_near"] is None and scores["IRA_far"] == scores["IRA"] == 1.0


def test_held_objects_are_neither_near_nor_far():
    scores = unlearning_scores(answers(ROWS), [Target("object", CAT, (DOG,))], held=[DOG])
    assert (scores["IRA"], scores["IRA_near"], scores["IRA_far"], scores["IRA_held"]) == (0.75, None, 1.0, 0.5)


def test_with_targets_of_both_kinds_only_images_of_neither_are_retained():
    scores = unlearning_scores(answers(ROWS), [Target("object", CAT, (DOG,)), Target("style", 1, ())])
    assert scores["UA"] == pytest.approx((3 + 1) / 8)
    assert scores["IRA"] == scores["CRA"] == 1.0  # the two images (DOG, 0) and (CAR, 0)


def test_without_recognised_styles_there_is_no_cra():
    scores = unlearning_scores(answers(ROWS, styles=False), [Target("object", CAT, ())])
    assert scores["CRA"] is None and scores["CTA"] is None and scores["SA"] is None and scores["UA"] == 0.75


def test_intervals_over_a_hundred_thousand_prompts_take_seconds_and_little_memory():
    rng = np.random.default_rng(0)
    images = 100_000
    asked, seen = rng.integers(0, 3, (2, images))
    many = Answers(np.arange(images), asked, asked % 2, seen, seen % 2)
    began = time.perf_counter()
    tracemalloc.start()
    intervals = bootstrap_intervals(many, [Target("object", CAT, (DOG,))], rounds=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    low, high = intervals["UA"]
    assert low < unlearning_scores(many, [Target("object", CAT, (DOG,))])["UA"] < high
    assert high - low == pytest.approx(4 * (2 / 9 / (images / 3)) ** 0.5, rel=0.2)
    assert peak < 1e8 and time.perf_counter() - began < 30  # alone: 4 s


def test_intervals_contain_the_score_and_have_no_width_for_a_constant():
    repeated = answers(ROWS * 5)
    intervals = bootstrap_intervals(repeated, [Target("object", CAT, (DOG,))], rounds=300)
    low, high = intervals["UA"]
    assert 0.5 < low < 0.75 < high < 0.95
    perfect = answers([(CAT, DOG, 0, 0), (DOG, DOG, 0, 0)] * 4)
    assert bootstrap_intervals(perfect, [Target("object", CAT, (DOG,))], rounds=50)["UA"] == (1.0, 1.0)


def test_images_of_one_prompt_are_resampled_together():
    rows = [(CAT, DOG, 0, 0)] * 10 + [(CAT, CAT, 0, 0)] * 10
    table = answers(rows)
    two_prompts = Answers(
        np.repeat([0, 1], 10), table.object_asked, table.style_asked, table.object_seen, table.style_seen
    )
    one_prompt = replace(two_prompts, prompt=np.zeros_like(two_prompts.prompt))
    # A single prompt has no spread over prompts.
    assert bootstrap_intervals(one_prompt, [Target("object", CAT, ())], rounds=200)["UA"] is None
    assert bootstrap_intervals(two_prompts, [Target("object", CAT, ())], rounds=200)["UA"] == (0.0, 1.0)


def test_corruption_and_velocity_by_hand():
    clean, noise, alpha_bar = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([0.64])
    assert float(ddpm_corrupt(clean, noise, alpha_bar)) == pytest.approx(0.8 * 2 + 0.6 * 3)
    assert float(ddpm_velocity(clean, noise, alpha_bar)) == pytest.approx(0.8 * 3 - 0.6 * 2)


def test_guided_label_moves_away_from_the_target():
    superclass, target = torch.tensor([1.0]), torch.tensor([3.0])
    assert guided_label(superclass, target, 0.0).tolist() == [1.0]
    assert guided_label(superclass, target, 2.0).tolist() == [-3.0]
    assert float(mse(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))) == 2.0


def test_one_cycle_agrees_with_torch_and_turnover_by_hand():
    assert one_cycle(0.3, 0.3) == 1.0
    assert one_cycle(0.0, 0.3) == pytest.approx(1 / 25) and one_cycle(1.0, 0.3) == pytest.approx(1 / 250_000)
    assert one_cycle(0.0, 0.0) == 1.0
    torch_lr = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0), 1.0, total_steps=11
    )
    for step in range(11):  # torch rises until step 0.3 total - 1
        rise, total = 0.3 * 11 - 1, 10
        assert torch_lr.get_last_lr()[0] == pytest.approx(one_cycle(step / total, rise / total), rel=1e-6)
        torch_lr.optimizer.step()
        if step < 10:
            torch_lr.step()
    assert turnover_share(0.2, 0.0) == 0.2 and turnover_share(0.2, 0.5) == pytest.approx(0.1)
    assert turnover_count(100, 0.071) == 7 and turnover_count(100, 0.0) == 1 and turnover_count(0, 0.5) == 0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_agree_with_those_of_transformers(name):
    import transformers

    total, rise = 40, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = transformers.get_scheduler(
        {"constant": "constant_with_warmup"}.get(name, name), optimizer, num_warmup_steps=rise, num_training_steps=total
    )
    for step in range(total):
        expected = pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        assert learning_rate_factor(name, step / total, rise / total) == expected
        optimizer.step()
        reference.step()
