"""A step of the factors A (r, in) and B (out, r) that is measured on their product.

To first order a step (dA, dB) changes the product by B·dA + dB·A. Of the gradient G of B·A the factors see BᵀG and GAᵀ.
With U and Vᵀ orthonormal bases of B's columns and A's rows, and msign(Y) = (Y·Yᵀ)^-½·Y, all of whose singular values
are 1,

    B·D_A = U·msign(UᵀG)      D_B·A = msign(G·V)·Vᵀ      n = ‖B·D_A + D_B·A‖₂      (dA, dB) = −η/n · (D_A, D_B)

is the step of steepest descent in each factor's half of the tangent space, in spectral norm, and the whole changes the
product by exactly η to first order. The right-hand sides hold neither A nor B, only their spaces: the gauge
(A, B) → (T·A, B·T^-1), in which the same product can be written, does not move the step, and neither do the factors'
lengths nor a factor before the loss. With a triangular X_B such that X_B·X_Bᵀ = (BᵀB)^-1,

    U = B·X_B        UᵀG = X_Bᵀ·(BᵀG)        D_A = X_B·msign(UᵀG)

and n² is the largest eigenvalue of [U S_B]ᵀ[U S_B] · [S_A ; Vᵀ][S_A ; Vᵀ]ᵀ, (2r, 2r), S being the two msigns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..decompose.precision import full_precision

DAMPING = 1e-4
"""Added to a Gram matrix, relative to its size: directions that have less than a hundredth of the largest length are
not lengthened to it."""
ROUNDING = 8
"""What is added to a Gram matrix at least, in units of the dtype's precision and of its rank."""


class Direction(NamedTuple):
    """Where to move, such that B·D_A + D_B·A has spectral norm 1; both are 0 where there is no gradient."""

    D_A: Tensor
    """(n, r, in)."""
    D_B: Tensor
    """(n, out, r)."""


def direction(A: Tensor, B: Tensor, G_A: Tensor, G_B: Tensor, damping: float = DAMPING) -> Direction:
    """The direction of the step, uphill, of n pairs of factors at once.

    Args:
        A: (n, r, in), fp32 or fp64.
        B: (n, out, r). Where it is 0 only B moves, since D_A would change nothing; the other way round alike.
        G_A: (n, r, in), the gradient of A, or an average of gradients; finite. Its length does not matter.
        G_B: (n, out, r), that of B.
        damping: relative to the Frobenius norm of BᵀB and AAᵀ, and to the square of the gradient's largest singular
            value.
    """
    with full_precision():
        (X_A, seen_A), (X_B, seen_B) = whitener(A @ A.mT, damping), whitener(B.mT @ B, damping)
        Y_A, Y_B = X_B.mT @ unit(G_A), unit(G_B) @ X_A
        (Z_A, sign_A), (Z_B, sign_B) = inverse_root(Y_A @ Y_A.mT, damping), inverse_root(Y_B.mT @ Y_B, damping)
        left = _blocks(seen_B, X_B.mT @ (B.mT @ Y_B) @ Z_B, sign_B)
        right = _blocks(sign_A, Z_A @ (Y_A @ A.mT) @ X_A, seen_A)
        norm = _norm_of_product(left, right)[:, None, None]
        inverse = torch.where(norm > 0, 1 / norm, 0)
        return Direction((inverse * X_B @ Z_A) @ Y_A, Y_B @ (inverse * Z_B @ X_A.mT))


class Inverse(NamedTuple):
    """A root of a damped inverse, and what it makes of the matrix itself: the identity, but for damping.

    The second is not multiplied out: in directions that rounding alone has given a length it would be noise.
    """

    root: Tensor
    """R (n, r, r)."""
    kept: Tensor
    """Rᵀ·gram·R (n, r, r), of eigenvalues from 0 to 1."""


def whitener(gram: Tensor, damping: float) -> Inverse:
    """R with R·Rᵀ = (gram + damping·‖gram‖)^-1 for gram (n, r, r), positive semidefinite; 0 where that is 0."""
    size = torch.linalg.matrix_norm(gram, keepdim=True)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled, added = torch.where(size > 0, gram / size, identity), damping + _rounding(gram)
    factor, _ = torch.linalg.cholesky_ex(scaled + added * identity)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(gram), upper=False).mT
    kept = identity - added * inverse.mT @ inverse
    return Inverse(torch.where(size > 0, inverse / size.sqrt(), 0), torch.where(size > 0, kept, 0))


def inverse_root(gram: Tensor, damping: float) -> Inverse:
    """R = (gram + damping·its largest eigenvalue)^-½ for gram (n, r, r), positive semidefinite; 0 where that is 0."""
    values, vectors = torch.linalg.eigh(gram)
    largest = values[:, -1:]
    shares, added = (values / largest).clamp_min(0), damping + _rounding(gram)
    roots = torch.where(largest > 0, ((shares + added) * largest).rsqrt(), 0)
    kept = torch.where(largest > 0, shares / (shares + added), 0)
    return Inverse(*((vectors * each[:, None, :]) @ vectors.mT for each in (roots, kept)))


def unit(gradient: Tensor) -> Tensor:
    """Each gradient (n, …) over its largest entry, so that no square leaves the dtype's range; 0 stays 0."""
    largest = gradient.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, gradient / largest, 0)


def _norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """‖P·Q‖₂ (n,) out of the Gram matrices left = PᵀP and right = QQᵀ, each (n, 2r, 2r) and of norm 2 at most: too
    large by their shift's share, never too small."""
    shift = torch.finfo(left.dtype).eps ** 0.5
    identity = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    factor, failed = torch.linalg.cholesky_ex(left + shift * identity)
    squared = torch.linalg.eigvalsh(factor.mT @ right @ factor)[:, -1]
    bound = torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
    return torch.where(failed > 0, bound, squared).clamp_min(0).sqrt()


def _blocks(first: Tensor, off: Tensor, second: Tensor) -> Tensor:
    """[[first, off], [offᵀ, second]], each (n, r, r)."""
    return torch.cat([torch.cat([first, off], -1), torch.cat([off.mT, second], -1)], -2)


def _rounding(gram: Tensor) -> float:
    return ROUNDING * gram.shape[-1] * torch.finfo(gram.dtype).eps
