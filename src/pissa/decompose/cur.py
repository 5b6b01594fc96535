"""CURA: an adapter made of the weight's own columns and rows (the report's section 4).

    W ≈ C M R        C = W[:, J] (m, r)        R = W[I, :] (r, n)        M (r, r)
    B = C M D,  A = D⁻¹ R                      D diagonal, so that column i of B and row i of A have equal norms

I and J are drawn without replacement, with probability proportional to squared row and column norms (Hamm and Huang,
2020), which costs one look at W where an SVD costs many. The core M is one of

    "intersection"   pinv(W[I, J])    the report's; exact where W has rank r, and needs r² entries only
    "optimal"        C⁺ W R⁺          least squares: no other core leaves a smaller Frobenius norm

Weights of real models are far from rank r, their r × r intersections are nearly singular, and the inverse of such a
one is huge: on SmolLM2-135M at r = 16 the residual's norm is 2.5 to 70 times the weight's (once 6900 times) with
"intersection", 0.8 to 1.0 times with "optimal". Cutting the singular values of the intersection at `rcond` tames it
(0.3: 0.9 to 1.4 times). The residual's norm is therefore in the certificate, and one above 1 is a bad draw.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..config import CurCore
from .certificate import Certificate
from .lapack import pseudo_inverse
from .scale import energy, scaled, unscaled


def cur_approximation(
    W: Tensor,
    rank: int,
    *,
    core: CurCore = "optimal",
    rcond: float | None = None,
    seed: int = 0,
    largest: float | None = None,
) -> tuple[Tensor, Tensor, Certificate]:
    """Factors of W's CUR approximation.

    Args:
        W: (m, n), any float dtype.
        rank: r, 1 to min(m, n).
        core: what stands between columns and rows.
        rcond: singular values below this share of the largest count as zero in the pseudo-inverses; None for what fp64
            rounding leaves undetermined.
        seed: of the draw; the global generators are not touched.
        largest: W's largest magnitude where it is known, which saves a look at every entry.

    Returns:
        A (r, n), B (m, r), fp32, with `B·A = C·M·R` and equal norms component by component; and the certificate, whose
        `residual_norm` is `‖W − B·A‖ / ‖W‖`. Its captured-energy loss is an upper bound: it is measured against all of
        W's energy.
    """
    start = time.perf_counter()
    W, exponent = scaled(W, largest)
    generator = torch.Generator().manual_seed(seed)
    rows = drawn(W.square().sum(1), rank, generator)
    columns = drawn(W.square().sum(0), rank, generator)
    C, R = W[:, columns].double(), W[rows].double()
    M = pseudo_inverse(C[rows], rcond) if core == "intersection" else optimal_core(W, C, R, rcond)
    A, B = balanced(R, C @ M)
    total, left = float(energy(W)), float(energy(torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=-1)))
    share = left / total if total > 0 else 0.0
    A, B = balanced(unscaled(A, exponent), B)
    certificate = Certificate(
        f"cur-{core}",
        1,
        time.perf_counter() - start,
        share,
        "upper bound" if share <= 1 else "estimate",
        residual_norm=share**0.5,
    )
    return A.float(), B.float(), certificate


def optimal_core(W: Tensor, C: Tensor, R: Tensor, rcond: float | None) -> Tensor:
    """`C⁺ W R⁺` (r, r) fp64, for C (m, r) and R (r, n) in fp64; W is multiplied in its own precision, by orthonormal
    bases only."""
    left, upper = torch.linalg.qr(C)
    right, lower = torch.linalg.qr(R.mT)
    core = (left.mT.to(W.dtype) @ W).double() @ right
    return pseudo_inverse(upper, rcond) @ core @ pseudo_inverse(lower.mT, rcond)


def drawn(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn without replacement with probability proportional to the weights, sorted.

    Where fewer weights than that are positive, all of those and the first of the others.
    """
    probabilities = weights.double().cpu()
    positive = int((probabilities > 0).sum())
    if positive <= count:
        chosen = probabilities.argsort(descending=True, stable=True)[:count]
    else:
        chosen = torch.multinomial(probabilities, count, generator=generator)
    return chosen.sort().values.to(weights.device)


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """`D⁻¹A` and `BD` with equally long rows and columns; where either is zero both are left alone."""
    rows, columns = torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)
    D = torch.where((rows > 0) & (columns > 0), (rows / columns.clamp_min(1e-300)).sqrt(), 1.0)
    return A / D[:, None], B * D
