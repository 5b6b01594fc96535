"""Which algorithm is fastest: a cost model from shapes, rank and tolerance.

Times are modelled in units of one multiply-add of a matrix product. Only the ratios matter, and those hold from one
CPU to the next far better than the times; `benchmarks/svd.py` prints the model's choice beside the measured best.
"""

from __future__ import annotations

import math

WIDEST = 48
"""Columns of the widest Krylov block; wider ones gain no speed and lose polynomial degree."""
EXACT_BELOW = 6e-7
"""Tolerances below this are below what fp32 products can certify."""

EIGH = 4.0
"""A symmetric eigenproblem of size n, all vectors, costs this times n³ multiply-adds."""
OVERHEAD = 6e7
"""Fixed cost of one Krylov block in multiply-adds: small factorisations and calls."""


def choose(m: int, n: int, rank: int, tolerance: float, *, warm: bool = False) -> str:
    """The algorithm for a matrix (m, n), m ≥ n: "exact", "gram" or "krylov"."""
    if warm:
        return "krylov"
    if tolerance < EXACT_BELOW:
        return "exact"
    columns = krylov_columns(rank, tolerance)
    if columns + block_width(rank) > n:
        return "gram"
    return "gram" if gram_cost(m, n, rank) < krylov_cost(m, n, rank, columns) else "krylov"


def block_width(rank: int) -> int:
    """Columns of a Krylov block: narrow for a high polynomial degree, wide for the speed of the products."""
    return min(WIDEST, max(16, rank // 2))


def krylov_columns(rank: int, tolerance: float) -> int:
    """Columns after which real weights meet the tolerance: about 5r at 1e-3, 0.4r more for each further decade."""
    decades = max(0.0, math.log10(1e-3 / max(tolerance, EXACT_BELOW)))
    return int((5.0 + 0.4 * decades) * rank) + block_width(rank)


def gram_cost(m: int, n: int, rank: int) -> float:
    """Products WᵀW and W V, and one eigenproblem."""
    return m * n * n + m * n * rank + EIGH * n**3


def krylov_cost(m: int, n: int, rank: int, columns: int) -> float:
    """Products, two rounds of projections on both sides, the checks of the core, and the overhead of each block."""
    return (
        2 * m * n * columns + 2 * (m + n) * columns**2 + 4 * EIGH * columns**3 + OVERHEAD * columns / block_width(rank)
    )
