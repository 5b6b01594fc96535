"""The small problem at the heart of every projection method: Ritz triplets and what they can have missed.

A method that has built orthonormal U (m, K) and V (n, L) with `W V_old ⊂ span U` and `Wᵀ U = V Tᵀ`, where V_old are
all of V's columns but the newest b, knows W up to a part that both bases miss:

    W = U T Vᵀ + (I − UUᵀ) W (I − V_old V_oldᵀ)                                       T = UᵀWV  (K, L)

The singular triplets of T are the Ritz triplets: the best approximation of W with left vectors in span U. They
capture the energy Σ θᵢ², i ≤ r, exactly. What could the best approximation capture? By Loewner's order

    WᵀW ≤ V (TᵀT + d·P) Vᵀ + d·(I − VVᵀ)           d = ‖(I − UUᵀ) W‖₂²,  P = diag(0, I_b)

so the sum of the r largest eigenvalues of the small matrix (d where it has fewer) bounds the optimum from above
(Ky Fan), and 1 − Σθᵢ² / bound bounds the captured-energy loss. The only unknown is d. It is estimated by the energy
of the newest rows of T, which are the directions that the method found last, never below the mean
energy of a missed direction, never below a Ritz value that has as many copies as a block has columns (a Krylov
space holds no more of them), and never above the energy that is missed in all, `‖W‖² − ‖T‖²`: when that is all
gone, the bound is rigorous; until then the certificate is an estimate, and tests state how far off it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .lapack import singular_values, symmetric_eigen, symmetric_eigenvalues

ROUNDING = 3e-7
"""Relative error of energies of fp32 products: no certificate claims a smaller loss."""
FP32_ROUNDING = 3e-6
"""The same where the core's eigenvalues are computed in fp32 too."""


COINCIDENT = 1e-3
"""Relative spread of b neighbouring squared Ritz values below which they may be copies of one."""


@dataclass(frozen=True)
class Factorization:
    """What an algorithm hands to the front door: fp32 triplets with leading batch dimensions."""

    U: Tensor
    """(..., m, r)."""
    S: Tensor
    """(..., r), descending."""
    Vh: Tensor
    """(..., r, n)."""
    loss: Tensor
    """(...,) certified captured-energy loss."""
    passes: int
    bound: Literal["exact", "upper bound", "estimate"]


@dataclass(frozen=True)
class RitzTriplets:
    """Singular triplets of the core T, fp64, all with leading batch dimensions."""

    left: Tensor
    """(..., K, r): coordinates of the left vectors in U."""
    values: Tensor
    """(..., r), descending."""
    right: Tensor
    """(..., L, r): coordinates of the right vectors in V."""


@dataclass(frozen=True)
class Spectrum:
    """Squared Ritz values of one core, descending, and the loss that they certify."""

    energies: Tensor
    """(..., K) fp64."""
    loss: Tensor
    """(...,) fp64: certified captured-energy loss."""
    missed: Tensor
    """(...,) fp64: share of W's energy outside the core."""


def ritz_triplets(T: Tensor, rank: int) -> RitzTriplets:
    """The `rank` largest singular triplets of T (..., K, L), K ≥ rank, orthonormal even where values vanish."""
    T = T.double()
    energies, left = symmetric_eigen(T @ T.mT)
    values = energies[..., -rank:].flip(-1).clamp_min(0).sqrt()
    left = left[..., -rank:].flip(-1)
    # Householder's QR completes the directions whose singular value is zero; its R is diagonal up to rounding.
    right, R = torch.linalg.qr(T.mT @ left)
    return RitzTriplets(left, values, right * signs(R.diagonal(dim1=-2, dim2=-1))[..., None, :])


def certify(T: Tensor, rank: int, last: int, newest: int, total: Tensor, complement: int) -> Spectrum:
    """The captured-energy loss that the Ritz triplets of T can have at most, up to the estimate of d.

    Args:
        T: (..., K, L) core, fp64 or fp32.
        rank: r, at most K.
        last: how many columns the newest block of U has.
        newest: how many of V's last columns are not yet in V_old; 0 when V is complete.
        total: (...,) ‖W‖².
        complement: dimension of what U misses, `min(m, n) − K`.

    Returns:
        The spectrum; a loss of 0 for W = 0.
    """
    rounding = ROUNDING if T.dtype == torch.float64 else FP32_ROUNDING
    energies = symmetric_eigenvalues(T @ T.mT).flip(-1).clamp_min(0).double()
    captured = energies[..., :rank].sum(-1)
    missed = (total - energies.sum(-1)).clamp_min(0)
    best = captured
    if newest:
        d = missed_energy(T, energies, rank, last, newest, missed, complement)
        A = T.mT @ T
        A.diagonal(dim1=-2, dim2=-1)[..., -newest:] += d[..., None]
        best = symmetric_eigenvalues(A)[..., -rank:].double().clamp_min(d[..., None]).sum(-1)
    floor = total.clamp_min(torch.finfo(total.dtype).tiny)
    loss = torch.where(total > 0, 1 - captured / best.clamp_min(torch.finfo(best.dtype).tiny), 0.0)
    return Spectrum(energies, loss.clamp_min(0) + torch.where(total > 0, rounding, 0.0), missed / floor)


def missed_energy(
    T: Tensor, energies: Tensor, rank: int, last: int, newest: int, missed: Tensor, complement: int
) -> Tensor:
    """Estimate of d, the energy of the strongest direction that both bases miss; (...,)."""
    K = T.shape[-2]
    if last < K:
        block = T[..., -last:, :]
        found = symmetric_eigenvalues(block @ block.mT)[..., -1].double()
    else:
        # One block only, a subspace handed in: a converged one misses less than the first Ritz value beyond the
        # wanted ones, and what is unconverged of those shows in their coupling to the newest columns.
        wanted = symmetric_eigen(T @ T.mT)[1][..., -rank:]
        coupling = T[..., -newest:].mT @ wanted
        found = energies[..., min(rank, K - 1)] + singular_values(coupling)[..., 0].square().double()
    mean = missed / max(complement, 1)
    unseen = repeated_energy(energies, rank, last)
    return torch.minimum(torch.maximum(torch.maximum(found, mean), unseen), missed)


def repeated_energy(energies: Tensor, rank: int, block: int) -> Tensor:
    """The largest squared Ritz value among the first `rank` of which there seem to be as many copies as a block has
    columns, so that there may be more; 0 where there is none; (...,).
    """
    starts = min(rank, energies.shape[-1] - block + 1)
    if starts < 1:
        return torch.zeros_like(energies[..., 0])
    first, last = energies[..., :starts], energies[..., block - 1 : block - 1 + starts]
    return torch.where(first - last <= COINCIDENT * first, first, 0.0).amax(-1)


def signs(values: Tensor) -> Tensor:
    """+1 or −1 by entry; zero counts as positive."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
