"""The pieces of attacks by hand: projections, rounding, masks, wordings, crossings."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.attacks.base import Case, load_attack
from sculpt_dist.attacks.inpaint import centre
from sculpt_dist.attacks.paraphrase import misspelled
from sculpt_dist.attacks.parts.search import nearest
from sculpt_dist.attacks.quantize import ROUNDED, to_int8
from sculpt_dist.attacks.unlearn_diff_atk import _StraightThrough, onto_simplex
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError


def test_a_row_is_projected_onto_the_simplex():
    rows = torch.tensor([[0.5, 0.5, 0.5], [2.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1.0, 0.8, -1.0]])
    by_hand = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    assert torch.allclose(onto_simplex(rows), by_hand, atol=1e-6)


def test_a_drawn_token_is_one_hot_and_passes_the_clipped_gradient_on():
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    chosen = _StraightThrough.apply(weights, torch.tensor([2, 0]))
    assert chosen.tolist() == [[0, 0, 1], [1, 0, 0]]
    (chosen * torch.tensor([[0.5, -3.0, 2.0], [0.0, 1.0, -0.25]])).sum().backward()
    assert weights.grad.tolist() == [[0.5, -1.0, 1.0], [0.0, 1.0, -0.25]]


def test_the_nearest_token_is_that_of_the_smallest_angle():
    table = torch.nn.functional.normalize(torch.tensor([[10.0, 0.0], [1.0, 1.0], [0.0, 0.1]]), dim=-1)
    assert nearest(torch.tensor([[0.1, 0.12], [0.2, 5.0], [3.0, 0.2]]), table).tolist() == [1, 2, 0]


def test_int8_rounds_each_channel_to_127_steps_of_its_largest_value():
    weight = torch.tensor([[127.0, 0.4, -0.6], [1.27, 0.004, -0.016]])
    assert torch.allclose(to_int8(weight), torch.tensor([[127.0, 0.0, -1.0], [1.27, 0.0, -0.02]]))
    assert torch.equal(to_int8(torch.tensor([0.123, 5.0])), torch.tensor([0.123, 5.0]))  # a bias
    assert ROUNDED["bfloat16"](torch.tensor([1.001])).item() == 1.0


def test_the_middle_of_the_latent_is_masked():
    masked = centre((1, 4, 8, 8), 0.5)
    assert masked.sum() == 16 and masked[0, 0, 2:6, 2:6].all()
    assert centre((1, 4, 8, 8), 0.75).sum() == 36


def test_misspellings_differ_from_the_name():
    assert misspelled("boat") == ["baot", "boaat", "bot"]
    assert misspelled("a") == ["aa"] and misspelled("oo") == ["ooo", "o"]


def test_other_wordings_of_a_case():
    case = Case(Concept("cat", "animal"), 0, 0, "a photo of a cat", 1, 3.0)
    attack = load_attack(
        "paraphrase", "light", {"paraphrase": {"translations": {"cat": ["un chat"]}, "misspellings": 1}}
    )
    wordings = attack.wordings(case)
    assert {"cat", "the cat", "a photo of a act", "un chat"} <= set(wordings)
    assert case.prompt not in wordings and len(set(wordings)) == len(wordings)


def test_a_generation_keeps_its_best_and_its_size():
    attack = load_attack("ring_a_bell", "light", {"ring_a_bell": {"population": 10, "tokens": 4}})
    survivors, usable = torch.arange(20).view(5, 4), torch.arange(100, 110)
    people = attack.next_generation(survivors, usable, torch.Generator().manual_seed(0))
    assert people.shape == (10, 4) and torch.equal(people[0], survivors[0])
    known = set(survivors.flatten().tolist()) | set(usable.tolist())
    assert set(people.flatten().tolist()) <= known
    changed = [row for row in people[1:5] if row.tolist() not in survivors.tolist()]
    assert all(any((row == other).sum() == 3 for other in survivors) for row in changed)  # one token each


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nothing", {}, "there is no such attack"),
        ("seeds", {"seeds": {"cuont": 3}}, "count"),
        ("quantize", {"quantize": {"formats": ["int3"]}}, "float16, bfloat16, int8"),
        ("inpaint", {"inpaint": {"share": 1.5}}, "below 1"),
    ],
)
def test_a_wrong_attack_or_option_is_named(name, options, words):
    with pytest.raises(ConfigError, match=words):
        load_attack(name, "light", options)


def test_the_published_budget_differs_where_the_paper_does():
    light, published = (load_attack("unlearn_diff_atk", budget, {}).config for budget in ("light", "published"))
    assert (published.times, published.steps, published.lr, published.weight_decay) == (50, 40, 0.01, 0.1)
    assert (light.times, light.steps) == (20, 10)
    chosen = load_attack("unlearn_diff_atk", "published", {"unlearn_diff_atk": {"times": 2}}).config
    assert (chosen.times, chosen.steps) == (2, 40)
