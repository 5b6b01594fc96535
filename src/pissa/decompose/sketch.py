"""A start in low precision: the subspace is found with bf16 products, so that fp32 only has to polish and prove it.

A tensor core multiplies bf16 an order of magnitude faster than fp32. Rounding the products perturbs the basis, not the
answer: the sketch hands over the leading right Ritz vectors and a little more, and `krylov.py` starts from them in
fp32, whose first step (one product there, one back) is the last projection, Rayleigh-Ritz and the residual in one. If
the certificate does not hold after it, the fp32 iteration simply continues. Nothing here is specific to a GPU: the
same code runs on a CPU, where the tests compare it. It has not been timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .krylov import GolubKahan

DEPTH = 3.0
"""Columns of the sketch's bases in units of the rank."""
KEPT = 16
"""Ritz vectors kept beyond the rank."""


def sketched_start(W: Tensor, rank: int, start: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Leading right subspace of W by block Krylov in W's own, low, precision.

    Args:
        W: (..., m, n) bf16 or fp16, m ≥ n.
        rank: r.
        start: (..., n, b) fp32 first block; overwritten.
        generator: on W's device.

    Returns:
        (..., n, k) fp32 with r ≤ k ≤ r + 16, and the products that it took.
    """
    n = W.shape[-1]
    state = GolubKahan(W, start, generator, capacity=int(DEPTH * rank))
    while not state.complete and state.U.count < min(n, max(rank, int(DEPTH * rank))):
        state.advance()
    _, _, Vh = state.triplets(min(rank + KEPT, state.U.count))
    return Vh.mT.contiguous(), state.passes
