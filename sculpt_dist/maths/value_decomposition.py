"""Orthogonal decomposition of attention values (AdaVD, arXiv 2412.06143).

Letters in shapes: n targets, d width of the values of all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_schmidt(values: Tensor) -> tuple[Tensor, Tensor]:
    """(P [n, n], basis [n, d]) with basis = P values, its rows at right angles, and P lower triangular with ones.

    A row that depends on earlier ones has a basis row of zero.
    """
    values, transform = values.double(), torch.eye(len(values), dtype=torch.float64)
    basis = values.clone()
    for i in range(len(values)):
        for j in range(i):
            norm = basis[j].square().sum()
            if norm > 0:
                weight = (basis[j] @ values[i]) / norm
                basis[i] -= weight * basis[j]
                transform[i] -= weight * transform[j]
        if basis[i].square().sum() <= 1e-12 * values[i].square().sum():  # rounding is all that is left
            basis[i] = 0
    return transform, basis


def shift_factor(similarity: Tensor, slope: float, middle: float, top: float) -> Tensor:
    """f(s) = c / (1 + exp(-a (s - b))) for a = slope, b = middle, c = top; of any shape."""
    return top * torch.sigmoid(slope * (similarity - middle))


def erased_part(tokens: Tensor, values: Tensor, factors: Tensor, transform: Tensor, basis: Tensor) -> Tensor:
    """What is subtracted from the values of tokens [..., d]: w P (f v), with w = <basis, token> / <basis, basis>.

    `values` [n, d] of the targets; `factors` [..., n], f of each target at each token. With f = 1 this is the part of
    the token that lies in the space of the targets' values.
    """
    norms = basis.square().sum(-1)  # [n]
    weights = torch.where(norms > 0, (tokens @ basis.mT) / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)
    return ((weights @ transform) * factors) @ values
