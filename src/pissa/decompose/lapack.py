"""Factorisations that end with a result, whatever the matrix and whoever's LAPACK it is.

A routine that iterates may give up ("failed to converge") and one that needs a positive pivot may meet rounding; which
matrices that happens to differs from one library and processor to the next, and it must never be the user's problem.
Each function here tries torch's routine as it is, then in fp64, then on the same matrix in other coordinates: for an
orthogonal H (a Householder reflection with fixed random entries), `H A Hᵀ` has the eigenvalues of A, and its iteration
takes another way. What is left after that is not finite, and a WeightError says so.

All functions take leading batch dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import WeightError

MORE_DAMPING = 100.0
"""Factor from one damping of a Cholesky factorisation to the next."""
LEAST_DAMPING, MOST_DAMPING = 1e-12, 1e-2
"""Shares of the mean diagonal."""


def symmetric_eigen(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of a symmetric matrix, in its dtype.

    Raises:
        WeightError: it is not finite.
    """

    def elsewhere() -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(reflected(reflected(G.double()).mT).mT)
        return values, reflected(vectors)

    values, vectors = first_that_ends(
        [lambda: tuple(torch.linalg.eigh(G)), lambda: tuple(torch.linalg.eigh(G.double())), elsewhere], G
    )
    return values.to(G.dtype), vectors.to(G.dtype)


def symmetric_eigenvalues(G: Tensor) -> Tensor:
    """Eigenvalues (..., n) of a symmetric matrix, ascending, in its dtype.

    Raises:
        WeightError: it is not finite.
    """
    (values,) = first_that_ends([lambda: (torch.linalg.eigvalsh(G),), lambda: (symmetric_eigen(G.double())[0],)], G)
    return values.to(G.dtype)


def thin_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., m, k), S (..., k) descending and Vh (..., k, n), k = min(m, n), in A's dtype.

    Raises:
        WeightError: A is not finite.
    """

    def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.linalg.svd(A, full_matrices=False))

    def elsewhere() -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(reflected(reflected(A.double()).mT).mT)
        return reflected(U), S, reflected(Vh.mT).mT

    U, S, Vh = first_that_ends([lambda: svd(A), lambda: svd(A.double()), elsewhere], A)
    return U.to(A.dtype), S.to(A.dtype), Vh.to(A.dtype)


def singular_values(A: Tensor) -> Tensor:
    """The singular values (..., min(m, n)), descending, in A's dtype.

    Raises:
        WeightError: A is not finite.
    """
    (values,) = first_that_ends([lambda: (torch.linalg.svdvals(A),), lambda: (thin_svd(A.double())[1],)], A)
    return values.to(A.dtype)


def pseudo_inverse(A: Tensor, rtol: float | None = None) -> Tensor:
    """A⁺ (..., n, m) in A's dtype; singular values up to `rtol` times the largest, or up to rounding, count as zero.

    Raises:
        WeightError: A is not finite.
    """
    U, S, Vh = thin_svd(A)
    share = max(A.shape[-2:]) * torch.finfo(A.dtype).eps if rtol is None else rtol
    kept = share * S[..., :1]
    inverse = torch.where((kept < S) & (S > 0), 1 / S, 0.0)
    return (Vh.mT * inverse[..., None, :]) @ U.mT


def damped_cholesky(M: Tensor) -> Tensor:
    """L (..., n, n), lower triangular, with `L Lᵀ = M` for a positive definite M.

    Where rounding leaves M not quite that, the smallest of a few growing shares of its mean diagonal is added.

    Raises:
        WeightError: M has negative eigenvalues that no rounding explains, or is not finite.
    """
    factor, info = torch.linalg.cholesky_ex(M)
    damping = LEAST_DAMPING
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    while bool((info != 0).any()) and damping <= MOST_DAMPING:
        extra = damping * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
        factor, info = torch.linalg.cholesky_ex(M + torch.diag_embed(extra.expand_as(diagonal)))
        damping *= MORE_DAMPING
    if bool((info != 0).any()):
        raise WeightError(f"a matrix of shape {tuple(M.shape)} is not positive definite; add to its diagonal")
    return factor


def first_that_ends(attempts: Sequence[Callable[[], tuple[Tensor, ...]]], A: Tensor) -> tuple[Tensor, ...]:
    """The first result that is finite.

    Raises:
        WeightError: there is none.
    """
    for attempt in attempts:
        try:
            found = attempt()
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue
        # NaN anywhere shows in the values, and these are few
        if math.isfinite(float(min(found, key=Tensor.numel).sum())):
            return found
    raise WeightError(
        f"no factorisation of a matrix of shape {tuple(A.shape)} ended with a finite result; are there values in the "
        "weight near the ends of the range of its dtype? Repair or rescale it, or leave it out by exclude_modules"
    )


def reflected(A: Tensor) -> Tensor:
    """`H A` for a fixed Householder reflection `H = I − 2vvᵀ / vᵀv`, its own inverse."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(A.shape[-2], 1, generator=generator, dtype=torch.float64).to(A.device, A.dtype)
    return A - v @ ((2 / v.square().sum()) * (v.mT @ A))
