"""A start in low precision: bf16 products find the subspace, so that fp32 only has to polish and prove it.

    X_{j+1} = orth(Wᵀ(W X_j))  against all earlier blocks          block Lanczos on WᵀW, both products in bf16

Units for bf16 multiply several times as fast as those for fp32, and weights in checkpoints are exact in bf16. Rounding
the products perturbs the basis, not the answer: the leading Ritz vectors and a few more go to `krylov.py`, whose
first step in fp32 (one product there, one back) is projection, Rayleigh-Ritz and residual in one. Where the
certificate does not hold after it, the fp32 iteration simply continues.

What then costs most is orthogonalisation, which gains nothing from bf16; so there is one for each block, on W's short
side alone: its coefficients are the projected matrix VᵀWᵀWV, whose eigenvectors are all that is needed here. Squaring
the condition number is harmless, because directions that are lost to it hold no energy that counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .krylov import Columns
from .lapack import symmetric_eigen
from .orthogonal import orthonormalize

DEPTH = 3.0
"""Columns of the basis in units of the rank."""
KEPT = 16
"""Ritz vectors kept beyond the rank."""


def sketched_start(
    W: Tensor, rank: int, start: Tensor, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Leading right subspace of W by block Lanczos with products in low precision.

    Args:
        W: (..., m, n) fp32, m ≥ n.
        rank: r.
        start: (..., n, b) fp32 first block; overwritten.
        generator: on W's device.
        dtype: of the products.

    Returns:
        (..., n, k) fp32 with r ≤ k ≤ r + 16, and the products that it took.
    """
    n, b = start.shape[-2:]
    low, wanted, passes = W.to(dtype), min(n, max(rank, int(DEPTH * rank))), 0
    V = Columns(W, n, min(n, wanted + 2 * b))
    newest = V.append(orthonormalize(start, None, generator)[0])
    columns: list[Tensor] = []
    while True:
        Z = product(low.mT, product(low, newest))
        passes += 2
        columns.append(V.filled.mT @ Z)
        if V.count >= wanted:
            break
        # where fewer directions are left than a block has, any basis of them will do
        newest = V.append(orthonormalize(Z[..., : n - V.count], V.filled, generator)[0])
    _, vectors = symmetric_eigen(projected(columns))
    kept = min(rank + KEPT, V.count)
    return V.filled @ vectors[..., -kept:].flip(-1), passes


def product(A: Tensor, X: Tensor) -> Tensor:
    """`A·X` in A's precision, returned in fp32."""
    return (A @ X.to(A.dtype)).float()


def projected(columns: list[Tensor]) -> Tensor:
    """The symmetric matrix (..., K, K) fp32 whose block of columns j is given down to its diagonal block."""
    K = columns[-1].shape[-2]
    H = columns[0].new_zeros((*columns[0].shape[:-2], K, K))
    left = 0
    for block in columns:
        right = left + block.shape[-1]
        H[..., : block.shape[-2], left:right] = block
        left = right
    upper = H.triu()
    return upper + upper.triu(1).mT
