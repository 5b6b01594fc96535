"""The whole spectrum at once: LAPACK's SVD, and the eigenvectors of the smaller Gram matrix.

    WᵀW = V Λ Vᵀ,   W V_r = U_r diag(S)                                    W (m, n) with m ≥ n

Two passes over W and one symmetric eigenproblem of the smaller side: several times cheaper than the SVD, and the best
choice when min(m, n) is small or the rank is a large share of it. Squaring W squares its condition: a singular value
below about sqrt(eps)·σ₁ is lost in Λ. So Λ only selects the subspace, in fp64 when a small loss is asked for; the
values and left vectors come from W V_r itself: through its own r × r Gram matrix in fp64 where that is well
conditioned, else by QR and the SVD of a small triangle. That keeps them accurate to fp32 rounding and orthonormal
whatever the spectrum.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .lapack import symmetric_eigen, thin_svd
from .orthogonal import orthonormalize
from .ritz import FP32_ROUNDING, ROUNDING, Factorization

FP64_BELOW = 1e-5
"""Tolerances below this form and diagonalise the Gram matrix in fp64."""
PANELS = 4
"""Column panels of a Gram matrix: of the products above the diagonal, only those inside the panels are computed."""
WELL_CONDITIONED = 1e-3
"""Smallest ratio of captured energies at which `W V (VᵀWᵀW V)^(−1/2)` is orthonormal to fp32 rounding."""
PANELS_FROM = 256
"""Size of a Gram matrix from which panels pay."""


def exact_svd(W: Tensor, rank: int) -> Factorization:
    """The full SVD (LAPACK's or cuSOLVER's), truncated; W (..., m, n) fp32."""
    U, S, Vh = thin_svd(W)
    loss = torch.zeros(W.shape[:-2], dtype=torch.float64, device=W.device)
    return Factorization(U[..., :rank], S[..., :rank], Vh[..., :rank, :], loss, 0, "exact")


def gram_svd(
    W: Tensor, rank: int, tolerance: float, generator: torch.Generator, G: Tensor | None = None
) -> Factorization:
    """The r largest singular triplets of W (..., m, n) fp32, m ≥ n, by way of G = WᵀW (formed here unless given in
    fp32); the certificate is Ky Fan's."""
    if G is None or tolerance < FP64_BELOW:
        G = gram_matrix(W.double() if tolerance < FP64_BELOW else W)
    energies, vectors = symmetric_eigen(G)
    best = energies[..., -rank:].double().clamp_min(0).sum(-1)
    rounding = ROUNDING if G.dtype == torch.float64 else FP32_ROUNDING
    return triplets_along(W, vectors[..., -rank:].flip(-1).float(), best, generator, rounding)


def gram_matrix(A: Tensor) -> Tensor:
    """`AᵀA` (..., n, n), the product of symmetric halves computed once."""
    n = A.shape[-1]
    if n < PANELS_FROM or A.is_cuda:
        return A.mT @ A
    G = A.new_empty((*A.shape[:-2], n, n))
    edges = [n * i // PANELS for i in range(PANELS + 1)]
    for left, right in pairwise(edges):
        panel = A[..., left:].mT @ A[..., left:right]
        G[..., left:, left:right] = panel
        G[..., left:right, right:] = panel[..., right - left :, :].mT
    return G


def triplets_along(
    W: Tensor, V: Tensor, best: Tensor, generator: torch.Generator, rounding: float = ROUNDING
) -> Factorization:
    """The singular triplets of W restricted to the span of V (..., n, r), nearly orthonormal.

    Args:
        W: (..., m, n) fp32.
        V: (..., n, r) fp32 right vectors, orthonormal to fp32 rounding unless W V is badly conditioned.
        best: (...,) fp64, at least what any r directions can capture; the loss is measured against it.
        generator: W = 0 and dependent columns are completed by random ones, whose singular value is 0.
        rounding: relative error of `best`, added to the loss.
    """
    Y = W @ V
    wide = Y.double()
    energies, right = symmetric_eigen(wide.mT @ wide)
    if bool((energies[..., 0] > WELL_CONDITIONED * energies[..., -1]).all()):
        S, right = energies.flip(-1).sqrt(), right.flip(-1)
        Q, Vh = Y @ (right / S[..., None, :]).float(), right.mT.float() @ V.mT
    else:
        V, _, _ = orthonormalize(V.clone(), None, generator)
        Q, _, R = orthonormalize(W @ V, None, generator)
        left, S, right = thin_svd(R.double())
        Q, Vh = Q @ left.float(), right.float() @ V.mT
    captured = S.square().sum(-1)
    loss = (1 - captured / best.clamp_min(torch.finfo(best.dtype).tiny)).clamp_min(0) + rounding
    loss = torch.where(best > 0, loss, 0.0)
    return Factorization(Q, S.float(), Vh, loss, 2, "upper bound")
