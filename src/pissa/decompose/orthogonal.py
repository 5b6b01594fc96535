"""Orthonormal bases of blocks of vectors: CholeskyQR2, shifted, with Householder's QR to fall back on.

    G = YᵀY = RᵀR,   Q = Y R⁻¹                    CholeskyQR: two matrix products and one small factorisation

costs a fraction of Householder's QR but loses orthogonality like cond(Y)². Doing it twice (Yamamoto et al., 2015)
restores it to rounding level, and a small shift `G + sI` (Fukaya et al., arXiv 1809.11085) keeps the first
factorisation alive for blocks that are nearly rank-deficient. The Gram matrix is taken in fp64, where the square of
an fp32 condition number fits. Where even that fails, columns are exactly dependent: Householder's QR takes over and
the dependent columns are replaced by random ones, so that the basis is always complete and always orthonormal.

Against an existing basis the block is projected before every round, which is classical Gram-Schmidt with "twice is
enough" (Giraud, Langou and Rozložník, 2005): the round whose Gram matrix was already close to I is the last one.

All functions take leading batch dimensions. Shapes: Y (..., n, b), basis (..., n, k), C (..., k, b), R (..., b, b).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROUNDS = 8
NEARLY_ORTHONORMAL = 0.1
SHIFT = 1e-15
DEPENDENT = 1e-6


def orthonormalize(Y: Tensor, basis: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
    """Split a block into its part in a basis and an orthonormal block outside: `Y = basis·C + Q·R`.

    Args:
        Y: (..., n, b) fp32 with b + k ≤ n; overwritten.
        basis: (..., n, k) with orthonormal columns, or None.
        generator: for the columns that replace dependent ones; on Y's device.

    Returns:
        Q (..., n, b) orthonormal and orthogonal to the basis, C (..., k, b) or None, R (..., b, b). Rows of R that
        belong to replaced columns are zero up to rounding.
    """
    C: Tensor | None = None
    R: Tensor | None = None
    for round_ in range(MAX_ROUNDS):
        if basis is not None:
            D = basis.mT @ Y
            subtract_product(Y, basis, D)
            C = D if C is None or R is None else C + D @ R
        # After a first round fp32 is enough to see that the block is nearly orthonormal, and to finish it.
        G = (Y.mT @ Y).double() if round_ else gram_fp64(Y)
        deviation = largest_deviation(G)
        if round_ and deviation >= NEARLY_ORTHONORMAL:
            G = gram_fp64(Y)
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        shifted = G + torch.diag_embed((SHIFT * diagonal.sum(-1, keepdim=True)).expand_as(diagonal))
        upper, info = torch.linalg.cholesky_ex(shifted, upper=True)
        if bool((info != 0).any()) or bool((diagonal == 0).any()):
            Y, step = complete_basis(Y, generator)
        else:
            step = upper.to(Y.dtype)
            Y = torch.linalg.solve_triangular(step, Y, upper=True, left=False)
        R = step if R is None else step @ R
        if deviation < NEARLY_ORTHONORMAL:
            return Y, C, R
    raise AssertionError(f"{MAX_ROUNDS} rounds did not orthonormalise a block of shape {tuple(Y.shape)}")


def gram_fp64(Y: Tensor) -> Tensor:
    """`YᵀY` in fp64."""
    wide = Y.double()
    return wide.mT @ wide


def complete_basis(Y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Householder's QR of a block whose columns may be dependent: an orthonormal Q (..., n, b) and `R = QᵀY`."""
    _, upper = torch.linalg.qr(Y)
    pivots = upper.diagonal(dim1=-2, dim2=-1).abs()
    dependent = pivots <= DEPENDENT * pivots.amax(-1, keepdim=True)
    # Scaled to the block, so that the random columns neither drown nor are drowned by the others.
    size = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    random = torch.randn(Y.shape, dtype=Y.dtype, device=Y.device, generator=generator) * size / Y.shape[-2] ** 0.5
    Q, _ = torch.linalg.qr(torch.where(dependent[..., None, :], random, Y))
    return Q, Q.mT @ Y


def subtract_product(Y: Tensor, A: Tensor, B: Tensor) -> None:
    """`Y −= A·B` in place, without a temporary."""
    if Y.ndim == 2:
        Y.addmm_(A, B, alpha=-1)
    else:
        Y.baddbmm_(A, B, alpha=-1)


def largest_deviation(G: Tensor) -> float:
    """`max |G − I|` over all entries and the whole batch; infinite where G is not finite."""
    value = float((G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)).abs().amax())
    return value if value == value else float("inf")
