"""Which algorithm is fastest: a cost model from shapes, rank and tolerance.

Times are modelled in milliseconds on one core of the CPU that the coefficients were fitted on, sizes 192 to 4096 and
ranks 8 to 128. Only the ratios matter, and those hold from one CPU to the next far better than the times.
"""

from __future__ import annotations

import math

from .chebyshev import LOWEST_TOLERANCE, filter_width

WIDEST = 48
"""Columns of the widest Krylov block; wider ones gain no speed and lose polynomial degree."""
EXACT_BELOW = 6e-7
"""Tolerances below this are below what fp32 products can certify."""

GIGA = 1e-9
"""Coefficients are milliseconds for 10⁹ multiply-adds."""


def choose(m: int, n: int, rank: int, tolerance: float, *, warm: bool = False) -> str:
    """The algorithm for a matrix (m, n), m ≥ n: "exact", "gram", "chebyshev" or "krylov"."""
    if warm:
        return "krylov"
    if tolerance < EXACT_BELOW:
        return "exact"
    costs = {"gram": gram_cost(m, n, rank)}
    columns = krylov_columns(rank, tolerance)
    if columns + block_width(rank) <= n:
        costs["krylov"] = krylov_cost(m, n, rank, columns)
    if tolerance >= LOWEST_TOLERANCE and filter_width(rank) < n:
        costs["chebyshev"] = chebyshev_cost(m, n, filter_width(rank))
    return min(costs, key=costs.__getitem__)


def block_width(rank: int) -> int:
    """Columns of a Krylov block: narrow for a high polynomial degree, wide for the speed of the products."""
    return min(WIDEST, max(16, rank // 2))


def krylov_columns(rank: int, tolerance: float) -> int:
    """Columns after which real weights meet the tolerance: about 4.5r at 1e-3, 0.4r more for each further decade."""
    decades = max(0.0, math.log10(1e-3 / max(tolerance, EXACT_BELOW)))
    return int((3.0 + 0.4 * decades) * rank) + 3 * block_width(rank)


def gram_cost(m: int, n: int, rank: int) -> float:
    """Half of the product WᵀW, one eigenproblem, and W V."""
    return 2 + GIGA * (18 * m * n**2 + 120 * n**3 + 4000 * n**2 + 80 * m * n * rank)


def chebyshev_cost(m: int, n: int, columns: int) -> float:
    """Half of the product WᵀW, some ten products with G, two projections and one Cholesky factorisation."""
    return 2.6 + GIGA * (18 * m * n**2 + 350 * n**2 * columns + 235 * n * columns**2 + 10 * n**3)


def krylov_cost(m: int, n: int, rank: int, columns: int) -> float:
    """Products and projections, the checks of the core, and the small factorisations of each block."""
    return GIGA * (184 * m * n * columns + 380 * columns**3) + 1.65 * columns / block_width(rank)
