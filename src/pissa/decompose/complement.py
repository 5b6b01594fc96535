"""Orthonormal blocks outside a basis by Householder reflections, for any block whatever.

    H_k ⋯ H₁ V = [R_V; 0]        so that    H₁ ⋯ H_k [0; X]   is orthogonal to V for every X (n − k, b)

In the coordinates that the reflections of the basis V give, its complement is simply the last n − k rows. The block's
rows there are factored by Householder's QR, whose Q is orthonormal for every input, and taken back: the result is
orthonormal and orthogonal to the basis because each reflection is orthogonal, not because something has converged
(Golub and Van Loan, Matrix Computations, section 5.2). In fp64, at several times CholeskyQR's cost, and seldom needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import WeightError
from .scale import magnitude, unscaled

DEPENDENT = 1e-6
"""Pivots up to this share of the largest belong to columns that depend on those before them."""


def orthonormal_complement(
    Y: Tensor, basis: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`Y = basis·C + Q·R` with an orthonormal Q that is orthogonal to the basis.

    Args:
        Y: (..., n, b) fp32 with b + k ≤ n: dependent columns, zero columns and columns inside the basis included.
        basis: (..., n, k) fp32 with linearly independent columns, or None.
        generator: of the random directions, outside the basis, that replace dependent columns; on Y's device.

    Returns:
        Q (..., n, b), C (..., k, b) or None, and R (..., b, b), fp32.

    Raises:
        WeightError: Y is not finite.
    """
    largest = magnitude(Y)
    if not math.isfinite(largest):
        raise WeightError(
            f"a block of shape {tuple(Y.shape)} overflowed fp32; rescale the weight, or leave it out by exclude_modules"
        )
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    wide = unscaled(Y.double(), exponent)
    if basis is None:
        Q, R = completed(wide, generator)
        return Q.to(Y.dtype), None, unscaled(R, -exponent).to(Y.dtype)
    k = basis.shape[-1]
    reflectors, tau = torch.geqrf(basis.double())
    turned = torch.ormqr(reflectors, tau, wide, left=True, transpose=True)
    C = torch.linalg.solve_triangular(reflectors[..., :k, :].triu(), turned[..., :k, :], upper=True)
    outside, R = completed(turned[..., k:, :], generator)
    inside = outside.new_zeros((*outside.shape[:-2], k, outside.shape[-1]))
    Q = torch.ormqr(reflectors, tau, torch.cat([inside, outside], -2), left=True, transpose=False)
    C = unscaled(C, -exponent).to(Y.dtype)
    return Q.to(Y.dtype), C, unscaled(R, -exponent).to(Y.dtype)


def completed(Y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal Q (..., n, b), random where columns of Y depend on earlier ones, and `R = QᵀY`; fp64."""
    _, upper = torch.linalg.qr(Y)
    pivots = upper.diagonal(dim1=-2, dim2=-1).abs()
    dependent = pivots <= DEPENDENT * pivots.amax(-1, keepdim=True)
    # Scaled to the block, so that the random columns neither drown nor are drowned by the others.
    size = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    random = torch.randn(Y.shape, dtype=torch.float32, device=Y.device, generator=generator) * size / Y.shape[-2] ** 0.5
    Q, _ = torch.linalg.qr(torch.where(dependent[..., None, :], random.to(Y.dtype), Y))
    return Q, Q.mT @ Y
