"""Closed-form edits of a linear map. Letters: n rows, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError


class EditSystem:
    """The equations for T [D, D] such that W' = W T minimises e sum |W' c - W c*|^2 + p sum |W' c_p - W c_p|^2 +
    l |W' - W|^2, where e, p and l are `erase`, `preserve` and `ridge`:

    T = (l I + e sum c* c^T + p sum c_p c_p^T) (l I + e sum c c^T + p sum c_p c_p^T)^-1

    (Gandikota et al., arXiv 2308.14761, eq. 7). Rows are added a few at a time; two sums in fp64 are all that is kept.
    """

    def __init__(self, width: int, ridge: float, erase: float, preserve: float, device: torch.device) -> None:
        self.erase, self.preserve = erase, preserve
        self.wanted = ridge * torch.eye(width, dtype=torch.float64, device=device)  # [D, D], the left factor
        self.present = self.wanted.clone()  # [D, D], the right factor before its inversion

    def add_erased(self, old: Tensor, new: Tensor) -> None:
        """Rows c and their counterparts c*, [n, D] each."""
        old, new = old.double(), new.double()
        self.wanted += self.erase * new.T @ old
        self.present += self.erase * old.T @ old

    def add_preserved(self, rows: Tensor) -> None:
        """Rows c_p [n, D]."""
        gram = self.preserve * rows.double().T @ rows.double()
        self.wanted += gram
        self.present += gram

    def transform(self) -> Tensor:
        """T, fp64 [D, D]. The right factor is positive definite where l > 0, so one Cholesky factorisation solves it.

        Raises NonFiniteError where it is not, by rounding.
        """
        return torch.cholesky_solve(self.wanted.T, _cholesky(self.present)).T


def fusion_factors(own: Tensor, whole: Tensor) -> Tensor:
    """G W^-1 [D, D], from a concept's G = sum e e^T and the sum W over all concepts, preserved rows and the ridge.

    dW G W^-1 is then the part of a change dW that the closed form for all concepts keeps: the minimiser of sum_i |V e -
    dW_i e|^2 over the rows of all concepts + p sum |V c_p|^2 + l |V|^2 is V = sum_i dW_i G_i W^-1 (Lu et al., arXiv
    2403.06135, eq. 7). Raises NonFiniteError where W is not positive definite.
    """
    return torch.cholesky_solve(own.T, _cholesky(whole)).T


def _cholesky(matrix: Tensor) -> Tensor:
    try:
        factor: Tensor = torch.linalg.cholesky(matrix)
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(
            f"the closed form has no single solution ({error}): raise method.ridge, its pull towards the old weights"
        ) from error
    return factor
