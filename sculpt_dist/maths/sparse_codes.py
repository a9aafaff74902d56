"""Sparse codes: which activations of an autoencoder's features count, and which features a concept has.

Letters in shapes: N vectors, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(activations: Tensor, most: int) -> Tensor:
    """The `most` largest activations of every vector, [N, F]; the others are 0."""
    values, places = activations.topk(min(most, activations.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(activations).scatter(-1, places, values)


def largest_of_batch(activations: Tensor, most: int) -> Tensor:
    """The N `most` largest activations of the whole batch, [N, F]; the others are 0 (BatchTopK, arXiv 2412.06410)."""
    return largest(activations.flatten(), most * len(activations)).view_as(activations)


def feature_scores(of_concept: Tensor, of_others: Tensor) -> Tensor:
    """mu_i(c) / sum_j mu_j(c) - mu_i(others) / sum_j mu_j(others), from mean activations [F] (arXiv 2501.18052)."""
    shares = [means / means.sum().clamp(min=1e-8) for means in (of_concept, of_others)]
    return shares[0] - shares[1]
