"""The best approximation of a matrix by the product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(up [m, r], down [r, n], squares [min(m, n)]) with up @ down the nearest to `matrix` [m, n] in Frobenius norm.

    r = min(rank, m, n). `squares` are the squared singular values of the matrix, largest first.

    Truncates M = U S V^T to its r largest singular values: up = U S^1/2 and down = S^1/2 V^T (Eckart and Young,
    Psychometrika 1, 1936). U comes from the eigenvectors of the smaller Gram matrix. Its eigenvalues are squared
    singular values, which would cost fp32 half of its digits, so everything is fp64, the factors included.
    Deterministic.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down, squares = low_rank_factors(matrix.T, rank)
        return down.T, up.T, squares
    wide = matrix.double()  # [m, n], m <= n
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # smallest first
    vectors = vectors[:, -rank:].flip(1)  # [m, r], largest first
    down = vectors.T @ wide  # [r, n]: the singular values are the norms of its rows
    root = torch.linalg.vector_norm(down, dim=1).sqrt()  # [r]
    return vectors * root, down / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None], squares.clamp_min(0).flip(0)
