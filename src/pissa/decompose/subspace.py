"""Randomized subspace iteration: the paper's fast SVD (appendix B), kept for reproduction and comparison.

    V ← orth(Ω);   niter times: V ← orth(Wᵀ orth(W V));   U ← orth(W V);   SVD of UᵀW

(Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.) Each iteration damps the unwanted part by
(σ_{r+1}/σ_r)², which is little when the spectrum decays slowly, and throws the earlier blocks away: `krylov.py`
keeps them. With `niter` given, the sketch has exactly r columns and the passes over W are `2 + 2·niter`, as in the
paper and in `torch.svd_lowrank(W, q=r, niter=niter)`; without, it is oversampled and iterates until the certificate
is met.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .krylov import GolubKahan
from .ritz import Factorization

OVERSAMPLING = 16
MAX_ITERATIONS = 64


def subspace_svd(
    W: Tensor,
    rank: int,
    tolerance: float,
    start: Tensor,
    generator: torch.Generator,
    total: Tensor,
    niter: int | None,
) -> Factorization:
    """The r largest singular triplets of W (..., m, n) fp32, m ≥ n.

    Args:
        W: (..., m, n) fp32, finite.
        rank: r.
        tolerance: certified loss at which to stop when `niter` is None; after 64 iterations the best there is.
        start: (..., n, k ≥ r) first sketch; overwritten.
        generator: on W's device.
        total: (...,) fp64, ‖W‖².
        niter: number of iterations, or None.
    """
    passes = 0
    for iteration in range(MAX_ITERATIONS + 1 if niter is None else niter + 1):
        state = GolubKahan(W, start, generator, capacity=start.shape[-1])
        state.advance()
        passes += 2
        if niter is None and float(state.certify(rank, total).loss.max()) <= tolerance:
            break
        if iteration < (MAX_ITERATIONS if niter is None else niter):
            # Wᵀ U spans what V times the core's transpose does, so the product is not repeated.
            start = state.V.filled @ state.core().mT.float()
    loss = state.certify(rank, total).loss
    U, S, Vh = state.triplets(rank)
    return Factorization(U, S, Vh, loss, passes, "upper bound" if state.complete else "estimate")
