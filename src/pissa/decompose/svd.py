"""Truncated singular value decomposition of a weight matrix, with a certificate of its accuracy.

    W ≈ U · diag(S) · Vᵀ        U (m, r), S (r,) descending, Vh = Vᵀ (r, n)

`exact` takes LAPACK's full SVD. `subspace` is the randomized range finder of Halko, Martinsson and Tropp
(arXiv 0909.4061, algorithms 4.4 and 5.1), oversampled: a Gaussian sketch is multiplied by W and Wᵀ in turn,
re-orthogonalised each time, and the SVD of the small projected matrix gives the triplets.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, WeightError
from .certificate import Certificate

Algorithm = Literal["auto", "exact", "subspace"]
OVERSAMPLING = 16


class TruncatedSVD(NamedTuple):
    """The r largest singular triplets of a matrix and the certificate that comes with them."""

    U: Tensor
    """(m, r), orthonormal columns, fp32."""
    S: Tensor
    """(r,), descending, fp32."""
    Vh: Tensor
    """(r, n), orthonormal rows, fp32."""
    certificate: Certificate


def truncated_svd(
    W: Tensor,
    rank: int,
    *,
    tolerance: float = 1e-3,
    algorithm: str = "auto",
    seed: int = 0,
    warm_start: Tensor | None = None,
) -> TruncatedSVD:
    """The r largest singular triplets of W.

    Args:
        W: (m, n), any float dtype; decomposed in fp32 and never modified.
        rank: r, 1 to min(m, n).
        tolerance: largest captured-energy loss.
        algorithm: "exact", "subspace" or "auto".
        seed: of the sketch, drawn from a generator of its own.
        warm_start: (n, k) right subspace of a nearby matrix, used as the first sketch.

    Returns:
        U, S, Vh and the certificate. Signs: the entry of largest magnitude in each column of U is positive.

    Raises:
        WeightError: W is not a finite matrix.
        ConfigError: the rank is out of range or the algorithm unknown.
    """
    start = time.perf_counter()
    if W.ndim != 2 or not W.is_floating_point():
        raise WeightError(f"a floating-point matrix is needed, got {W.dtype} of shape {tuple(W.shape)}")
    if not 1 <= rank <= min(W.shape):
        raise ConfigError(f"rank is {rank}; allowed: 1 to {min(W.shape)} for a matrix of shape {tuple(W.shape)}")
    W = W.detach().float()
    if not bool(torch.isfinite(W).all()):
        raise WeightError("the matrix holds NaN or Inf")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    U, Vh = fix_signs(U, Vh)
    return TruncatedSVD(U, S, Vh, Certificate("exact", 0, time.perf_counter() - start, 0.0, "exact"))


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip triplets so that the entry of largest magnitude in each column of U is positive."""
    pivot = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(pivot < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.T
