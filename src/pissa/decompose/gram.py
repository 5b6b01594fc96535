"""The whole spectrum at once: LAPACK's SVD, and the eigenvectors of the smaller Gram matrix.

    WᵀW = V Λ Vᵀ,   W V_r = U_r diag(S)                                    W (m, n) with m ≥ n

Two passes over W and one symmetric eigenproblem of the smaller side: several times cheaper than the SVD, and the best
choice when min(m, n) is small or the rank is a large share of it. Squaring W squares its condition: a singular value
below about sqrt(eps)·σ₁ is lost in Λ. So Λ only selects the subspace, in fp64 when a small loss is asked for; the
values and left vectors come from W V_r itself (QR, then the SVD of a small triangle), which keeps them accurate to
fp32 rounding and orthonormal whatever the spectrum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .orthogonal import orthonormalize
from .ritz import ROUNDING, Factorization

FP64_BELOW = 1e-5
"""Tolerances below this form and diagonalise the Gram matrix in fp64."""


def exact_svd(W: Tensor, rank: int) -> Factorization:
    """The full SVD (LAPACK's or cuSOLVER's), truncated; W (..., m, n) fp32."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    loss = torch.zeros(W.shape[:-2], dtype=torch.float64, device=W.device)
    return Factorization(U[..., :rank], S[..., :rank], Vh[..., :rank, :], loss, 0, "exact")


def gram_svd(W: Tensor, rank: int, tolerance: float, generator: torch.Generator) -> Factorization:
    """The r largest singular triplets of W (..., m, n) fp32, m ≥ n, by way of WᵀW; the certificate is Ky Fan's."""
    A = W.double() if tolerance < FP64_BELOW else W
    G = A.mT @ A
    energies, vectors = torch.linalg.eigh(G)
    V, _, _ = orthonormalize(vectors[..., -rank:].flip(-1).float(), None, generator)
    # W = 0 and dependent columns are completed by random ones, which `orthonormalize` returns with R = 0.
    Q, _, R = orthonormalize(W @ V, None, generator)
    left, S, right = torch.linalg.svd(R.double())
    best = energies[..., -rank:].double().clamp_min(0).sum(-1)
    captured = S.square().sum(-1)
    loss = (1 - captured / best.clamp_min(torch.finfo(best.dtype).tiny)).clamp_min(0) + ROUNDING
    loss = torch.where(best > 0, loss, 0.0)
    U, Vh = Q @ left.float(), right.float() @ V.mT
    return Factorization(U, S.float(), Vh, loss, 2, "upper bound")
