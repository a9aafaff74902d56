"""The formulas of the guards, with values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.maths.safe_guidance import safety_scale, safety_term
from sculpt_dist.maths.sparse_codes import feature_scores, largest, largest_of_batch
from sculpt_dist.maths.value_decomposition import erased_part, gram_schmidt, shift_factor

FIVE = torch.tensor([[0.1, 0.5, 0.3, 0.0, 0.4]])


def test_two_values_at_right_angles_are_their_own_basis():
    values = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    transform, basis = gram_schmidt(values)
    assert torch.equal(transform, torch.eye(2, dtype=torch.float64)) and torch.equal(basis, values.double())


def test_gram_schmidt_subtracts_what_lies_along_earlier_values():
    values = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    transform, basis = gram_schmidt(values)
    assert transform.tolist() == [[1.0, 0.0], [-1.5, 1.0]] and basis.tolist() == [[2.0, 0.0], [0.0, 4.0]]


def erased(token: torch.Tensor, values: torch.Tensor, factors: torch.Tensor) -> list[float]:
    transform, basis = gram_schmidt(values)
    return erased_part(token, values, factors, transform.float(), basis.float()).tolist()


def test_with_a_factor_of_one_the_rest_is_the_orthogonal_complement():
    values, token = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), torch.tensor([5.0, -2.0, 7.0])
    assert erased(token, values, torch.ones(2)) == [5.0, -2.0, 0.0]


@pytest.mark.parametrize("second", [[3.0, 4.0], [-6.0, -8.0]])
def test_a_target_that_depends_on_another_divides_by_nothing_and_adds_nothing(second):
    values, token = torch.tensor([[3.0, 4.0], second]), torch.tensor([1.0, 2.0])
    assert erased(token, values, torch.ones(2)) == pytest.approx([33 / 25, 44 / 25])  # <v*, v> = 11, <v*, v*> = 25


def test_each_target_is_erased_by_its_own_factor():
    values, token = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([6.0, 5.0])
    assert erased(token, values, torch.tensor([0.5, 2.0])) == [3.0, 10.0]


def test_the_shift_factor_has_half_its_height_in_the_middle_and_all_of_it_beyond():
    found = shift_factor(torch.tensor([0.93, 1.0, 0.5]), 100.0, 0.93, 2.0)
    assert found.tolist() == pytest.approx([1.0, 2 / (1 + 2.718281828**-7), 0.0], abs=1e-6)


def test_the_two_largest_of_five_activations_stay():
    assert largest(FIVE, 2).tolist() == [pytest.approx([0, 0.5, 0, 0, 0.4])]
    assert torch.equal(largest(FIVE, 9), FIVE), "more than there are"


def test_the_largest_of_a_batch_may_all_be_in_one_vector():
    batch = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 0.5]])
    assert largest_of_batch(batch, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert largest(batch, 1).tolist() == [[5.0, 0.0, 0.0], [0.0, 2.0, 0.0]]


def test_a_score_is_the_share_on_the_concept_less_that_on_the_others():
    found = feature_scores(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, 5.0]))
    assert found.tolist() == [0.75, -0.25, -0.5]
    assert feature_scores(torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_the_safety_scale_is_zero_beyond_the_threshold_and_never_above_one():
    prompt, concept = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.25, 5.0, 0.0, 0.0])
    assert safety_scale(prompt, concept, scale=2.0, threshold=0.5).tolist() == [0.5, 1.0, 0.0, 0.0]


def test_the_safety_term_adds_the_momentum():
    plain, prompt, concept, momentum = (torch.tensor([x]) for x in (1.0, 0.0, 3.0, 10.0))
    assert safety_term(plain, prompt, concept, 1.0, 0.0, momentum, 0.5).tolist() == [1.0 * (3 - 1) + 0.5 * 10]
