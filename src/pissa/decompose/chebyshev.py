"""A filtered subspace of the explicit Gram matrix, and a proof of its quality by one Cholesky factorisation.

    G = WᵀW (n, n),   Q ← orth(T_d(2G/c − I) Q),   QᵀGQ = diag(θ)              W (m, n), m ≥ n;  Q (n, K), K > r

Why: once G is there, a product with it costs n² a column, whatever m, so iterating is cheap, and the full eigenproblem
of G (the rest of `gram.py`'s time) can be avoided. The Chebyshev polynomial T_d stays below 1 on [0, c] and grows
faster outside than any other of its degree; with c the smallest Ritz value of the block it removes what the block
cannot hold (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006). No basis grows, so that
orthogonalisation is only ever that of K columns.

The certificate needs no estimate. With R = GQ − Q diag(θ), any t > 0 and H = diag(θ) + RᵀR / t, let d be at least the
r-th eigenvalue of H. If

    N = d·I − G + Q (H − d·I) Qᵀ

is positive semidefinite, then G ≤ d·I + Q (H − d·I) Qᵀ in Loewner's order, and by Ky Fan no r directions capture more
than the sum of max(λᵢ(H), d), i ≤ r. A Cholesky factorisation of N, a third of n³, decides. It exists as soon as what Q
misses, plus t, lies below d: t is half the distance from θ_r to θ_K, and while the answer is no, the filter goes on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gram import gram_matrix, gram_svd, triplets_along
from .lapack import symmetric_eigen, symmetric_eigenvalues
from .orthogonal import orthonormalize
from .ritz import Factorization

LOWEST_TOLERANCE = 1e-4
"""Below this, fp32 rounding of G hides what the certificate has to see."""
ROUNDING = 2e-6
"""Share of the largest energy that covers the rounding of N and of its factorisation."""
MARGIN = 0.1
"""Share of the tolerance that d may exceed the r-th eigenvalue by, on the average of the r."""
SHARE = 0.5
"""t as a share of the distance from θ_r to θ_K."""
DYNAMIC_RANGE = 3e4
"""Growth of the strongest direction that fp32 leaves room for between two orthogonalisations."""
TINY = 1e-30
"""In place of zero where something is divided by."""
MAX_DEGREE = 5
MAX_STAGES = 6
"""Filters after which the full eigenproblem is the better way."""
OVERSHOOT = 8.0
"""How much more the wanted directions are amplified than the square root of the missing accuracy asks for."""
FIRST_CUT, FIRST_CUT_OF_BLOCKS = 1.25, 0.2
"""The first c in units of G's mean eigenvalue, when no Ritz values are known: at most this, and this times n / K."""


def filter_width(rank: int) -> int:
    """Columns K of the block: beyond the rank, a margin that makes the filter's work easy."""
    return rank + max(16, rank // 2)


def chebyshev_svd(W: Tensor, rank: int, tolerance: float, start: Tensor, generator: torch.Generator) -> Factorization:
    """The r largest singular triplets of W (..., m, n) fp32, m ≥ n; the certificate is an upper bound.

    Args:
        W: (..., m, n) fp32, finite.
        rank: r.
        tolerance: certified loss at which to stop. Below 1e-4, and where filters do not get there, the full
            eigenproblem of the Gram matrix is solved instead.
        start: (..., n, K) with K > r, any columns.
        generator: replaces dependent columns; on W's device.
    """
    n, K = start.shape[-2:]
    if tolerance < LOWEST_TOLERANCE or not rank < K < n:
        return gram_svd(W, rank, tolerance, generator)
    G = gram_matrix(W)
    Q, Z, theta = project(G, first_filter(G, start), generator)
    for _ in range(MAX_STAGES):
        H, gain = coupling(Q, Z, theta, rank)
        best = proven_energy(G, Q, H, theta, rank, tolerance) if gain <= tolerance else None
        if best is not None:
            found = triplets_along(W, Q[..., :rank], best, generator)
            if float(found.loss.max()) <= tolerance:
                return found
        c = theta[..., -1].clamp_min(ROUNDING * theta[..., 0])
        wanted = degree(theta[..., rank - 1], c, OVERSHOOT * math.sqrt(max(gain / tolerance, 1.0)))
        Q, Z, theta = project(G, filtered(G, Q, Z, c, min(wanted, degree(theta[..., 0], c, DYNAMIC_RANGE))), generator)
    return gram_svd(W, rank, tolerance, generator, G)


def first_filter(G: Tensor, start: Tensor) -> Tensor:
    """A filter whose c and range come from the moments of G's spectrum, `Σλ / n` and `Σλ² / Σλ`."""
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    entries = G.flatten(-2)
    square = (entries[..., None, :] @ entries[..., None])[..., 0, 0]
    n, K = start.shape[-2:]
    c = min(FIRST_CUT, FIRST_CUT_OF_BLOCKS * n / K) * trace / n
    largest = square / trace.clamp_min(TINY)
    return filtered(G, start, G @ start, c, degree(largest, c, DYNAMIC_RANGE))


def filtered(G: Tensor, Q: Tensor, Z: Tensor, c: Tensor, degree: int) -> Tensor:
    """`T_d(2G/c − I) Q` by the three-term recurrence; `Z = G·Q` saves its first step. c is (...,)."""
    c = c.clamp_min(TINY)[..., None, None]
    before, now = Q, Z * (2 / c) - Q
    for _ in range(degree - 1):
        before, now = now, torch.addcmul(before, G @ now, 4 / c, value=-1).add_(now, alpha=2).neg_()
    return now


def degree(energy: Tensor, c: Tensor, growth: float) -> int:
    """The largest degree, 1 to 5, whose polynomial is at most about `growth` at an eigenvalue `energy` above c."""
    ratio = float((energy / c.clamp_min(TINY)).max())
    step = math.acosh(max(2 * ratio - 1, 1.0))
    room = math.acosh(growth)
    return MAX_DEGREE if step * MAX_DEGREE <= room else max(1, int(room / step))


def project(G: Tensor, Y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on the columns of Y: Ritz vectors Q (..., n, K), `G·Q`, and Ritz values (..., K), descending.

    One round of CholeskyQR leaves a deviation from orthonormality that the small eigenproblem takes along: with
    `QᵀQ = LLᵀ` the vectors of `L⁻¹ QᵀGQ L⁻ᵀ` rotate and orthonormalise at once.
    """
    Q = nearly_orthonormal(Y, generator)
    Z = G @ Q
    L, info = torch.linalg.cholesky_ex(Q.mT @ Q)
    if bool((info != 0).any()):
        Q = orthonormalize(Q, None, generator)[0]
        Z, L = G @ Q, torch.linalg.cholesky_ex(Q.mT @ Q)[0]
    H = torch.linalg.solve_triangular(L, Q.mT @ Z, upper=False)
    H = torch.linalg.solve_triangular(L.mT, H, upper=True, left=False)
    theta, vectors = symmetric_eigen(H)
    rotation = torch.linalg.solve_triangular(L.mT, vectors.flip(-1), upper=True)
    return Q @ rotation, Z @ rotation, theta.flip(-1)


def nearly_orthonormal(Y: Tensor, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of Y's columns up to a deviation well below 1: one round of CholeskyQR, if that does."""
    wide = Y.double()
    upper, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
    pivots = upper.diagonal(dim1=-2, dim2=-1)
    if bool((info != 0).any()) or bool((pivots <= 1e-5 * torch.linalg.vector_norm(upper, dim=-2)).any()):
        return orthonormalize(Y, None, generator)[0]
    return torch.linalg.solve_triangular(upper.to(Y.dtype), Y, upper=True, left=False)


def coupling(Q: Tensor, Z: Tensor, theta: Tensor, rank: int) -> tuple[Tensor, float]:
    """`RᵀR / t` (..., K, K), and its trace over the wanted r, about the loss: the largest of the batch."""
    R = Z - Q * theta[..., None, :]
    t = SHARE * (theta[..., rank - 1] - theta[..., -1]) + ROUNDING * theta[..., 0]
    H = (R.mT @ R) / t.clamp_min(TINY)[..., None, None]
    gain = H.diagonal(dim1=-2, dim2=-1)[..., :rank].sum(-1) / theta[..., :rank].sum(-1).clamp_min(TINY)
    return H, float(gain.max())


def proven_energy(G: Tensor, Q: Tensor, H: Tensor, theta: Tensor, rank: int, tolerance: float) -> Tensor | None:
    """A bound (...,) fp64 on what any r directions capture, or None where d is too small. H is overwritten."""
    slack = ROUNDING * theta[..., 0]
    H.diagonal(dim1=-2, dim2=-1).add_(theta + slack[..., None])
    energies = symmetric_eigenvalues(H)[..., -rank:]
    d = energies[..., 0] + slack + MARGIN * tolerance * theta[..., :rank].mean(-1)
    H.diagonal(dim1=-2, dim2=-1).sub_(d[..., None])
    N = ((Q @ H) @ Q.mT).sub_(G)
    N.diagonal(dim1=-2, dim2=-1).add_(d[..., None])
    if bool((torch.linalg.cholesky_ex(N)[1] != 0).any()):
        return None
    # Where Q is orthonormal only up to ε, the part above d may be larger by 1 + ε (Ostrowski).
    deviation = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], device=Q.device)).double()
    above = (energies - d[..., None]).clamp_min(0).double().sum(-1)
    return rank * d.double() + (1 + deviation) * above
