"""The best approximation of a matrix by a product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [m, r], down [r, n]) of `matrix` [m, n], r = min(rank, m, n): no other up @ down of that rank is nearer in Frobenius norm.

    M = U S V^T cut to its r largest singular values, up = U S^1/2 and down = S^1/2 V^T (Eckart and Young, Psychometrika 1, 1936).
    U comes from the eigenvectors of the smaller Gram matrix, in fp64: that squares the singular values, of which fp32 would lose the
    lower half of the digits. The factors are fp64; no random numbers are drawn.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = low_rank_factors(matrix.T, rank)
        return down.T, up.T
    wide = matrix.double()  # [m, n], m <= n
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)  # [m, r], largest first
    down = vectors.T @ wide  # [r, n]: the singular values are the norms of its rows
    root = torch.linalg.vector_norm(down, dim=1).sqrt()  # [r]
    return vectors * root, down / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]
