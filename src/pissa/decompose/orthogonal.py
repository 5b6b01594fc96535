"""Orthonormal bases of blocks of vectors: CholeskyQR2, shifted, and Householder's QR where that does not get there.

    G = YᵀY = RᵀR,   Q = Y R⁻¹                    CholeskyQR: two matrix products and one small factorisation

costs a fraction of Householder's QR but loses orthogonality like cond(Y)². Doing it twice (Yamamoto et al., 2015)
restores it to rounding level, and a small shift `G + sI` (Fukaya et al., arXiv 1809.11085) keeps the first
factorisation alive for blocks that are nearly rank-deficient. The Gram matrix is taken in fp64, where the square of
an fp32 condition number fits. Against an existing basis the block is projected before every round, which is classical
Gram-Schmidt with "twice is enough" (Giraud, Langou and Rozložník, 2005): the round whose Gram matrix was already close
to I is the last one, but never the first.

No number of such rounds is certain to end. What is left of a column that depends on others is their rounding error; if
that error has their direction (ones repeated: every entry is rounded alike), so does what is left of it, round after
round. Whether it is rounding error or an exact zero is up to the processor. So after a few rounds `complement.py` takes
over, which is orthonormal by construction.

All functions take leading batch dimensions. Shapes: Y (..., n, b), basis (..., n, k), C (..., k, b), R (..., b, b).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .complement import orthonormal_complement

ROUNDS = 4
"""Rounds of CholeskyQR. Weights take two or three."""
NEARLY_ORTHONORMAL = 0.1
SHIFT = 1e-15
GRAM_RANGE = (1e-24, 1e24)
"""Where a block's squared norm lies outside, entries of R may not fit into fp32's normal numbers."""


def orthonormalize(Y: Tensor, basis: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
    """Split a block into its part in a basis and an orthonormal block outside: `Y = basis·C + Q·R`.

    Args:
        Y: (..., n, b) fp32 with b + k ≤ n; overwritten.
        basis: (..., n, k) with orthonormal columns, or None.
        generator: for the columns that replace dependent ones; on Y's device.

    Returns:
        Q (..., n, b) orthonormal and orthogonal to the basis, C (..., k, b) or None, R (..., b, b). Rows of R that
        belong to replaced columns are zero up to rounding.

    Raises:
        WeightError: Y is not finite.
    """
    C: Tensor | None = None
    R: Tensor | None = None
    for round_ in range(ROUNDS):
        if basis is not None:
            D = basis.mT @ Y
            subtract_product(Y, basis, D)
            C = D if C is None or R is None else C + D @ R
        # After a first round fp32 is enough to see that the block is nearly orthonormal, and to finish it.
        G = (Y.mT @ Y).double() if round_ else gram_fp64(Y)
        deviation = largest_deviation(G)
        if round_ and deviation >= NEARLY_ORTHONORMAL:
            G = gram_fp64(Y)
        step = triangle(G)
        if step is None:
            break
        step = step.to(Y.dtype)
        Y = torch.linalg.solve_triangular(step, Y, upper=True, left=False)
        R = step if R is None else step @ R
        # Projected only once, a block that was large inside the basis may not be orthogonal to it.
        if deviation < NEARLY_ORTHONORMAL and (round_ or basis is None):
            return Y, C, R
    Q, D, step = orthonormal_complement(Y, basis, generator)
    if R is None:
        return Q, D if C is None or D is None else C + D, step
    return Q, C if D is None or C is None else C + D @ R, step @ R


def triangle(G: Tensor) -> Tensor | None:
    """R, upper triangular fp64, with `RᵀR = G + sI`; None where a triangular solve with it cannot be relied on."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    size = diagonal.sum(-1, keepdim=True)
    fits = all(GRAM_RANGE[0] < each < GRAM_RANGE[1] for each in size.flatten().tolist())
    if not fits or float(diagonal.amin()) == 0:
        return None
    upper, info = torch.linalg.cholesky_ex(G + torch.diag_embed((SHIFT * size).expand_as(diagonal)), upper=True)
    return None if bool((info != 0).any()) else upper


def gram_fp64(Y: Tensor) -> Tensor:
    """`YᵀY` in fp64."""
    wide = Y.double()
    return wide.mT @ wide


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
