"""Closed-form edits of a linear map. Letters: n rows, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def edit_transform(old: Tensor, new: Tensor, preserved: Tensor, ridge: float, erase: float, preserve: float) -> Tensor:
    """T [D, D] such that W' = W T minimises e sum |W' c - W c*|^2 + p sum |W' c_p - W c_p|^2 + l |W' - W|^2.

    The rows of `old` are c, of `new` c* [n, D], of `preserved` c_p [m, D]; e, p and l are `erase`, `preserve` and
    `ridge`. T = (l I + e sum c* c^T + p sum c_p c_p^T) (l I + e sum c c^T + p sum c_p c_p^T)^-1 (Gandikota et al.,
    arXiv 2308.14761, eq. 7). The right factor is symmetric and, with l > 0, positive definite, so one Cholesky solves
    it.
    """
    common = ridge * torch.eye(old.shape[1], dtype=old.dtype, device=old.device) + preserve * preserved.T @ preserved
    wanted = common + erase * new.T @ old
    factor = torch.linalg.cholesky(common + erase * old.T @ old)
    return torch.cholesky_solve(wanted.T, factor).T
