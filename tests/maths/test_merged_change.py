"""Merged changes by hand."""

import pytest
import torch

from sculpt_dist.maths.merging import magnitude_threshold, merged_change

CHANGES = [
    torch.tensor([4.0, -1.0, 0.5, 0.0]),
    torch.tensor([2.0, 3.0, -2.0, 0.0]),
    torch.tensor([-3.0, 1.0, 0.0, 1.0]),
]


def test_mean_and_task_by_hand():
    assert merged_change(CHANGES, "mean").tolist() == pytest.approx([1, 1, -0.5, 1 / 3])
    assert merged_change(CHANGES, "task").tolist() == [3, 3, -1.5, 1]


def test_ties_trims_elects_a_sign_and_averages_those_that_have_it():
    limits = [magnitude_threshold([change], 0.5) for change in CHANGES]
    assert limits == [1.0, 2.0, 1.0]
    # kept: [4, -1, 0, 0], [2, 3, -2, 0], [-3, 1, 0, 1]; signs of the sums: +, +, -, +
    assert merged_change(CHANGES, "ties", limits).tolist() == [3, 2, -2, 1]
    alone = merged_change(CHANGES[:1], "ties", [0.0])
    assert torch.equal(alone, CHANGES[0]), "one change alone is itself"


def test_a_threshold_is_of_all_tensors_together():
    tensors = [torch.tensor([[5.0, -1.0], [2.0, 0.1]]), torch.tensor([-4.0, 3.0])]
    assert magnitude_threshold(tensors, 1 / 3) == 4.0
    assert magnitude_threshold(tensors, 1.0) == pytest.approx(0.1)
    assert magnitude_threshold(tensors, 1e-9) == 5.0
