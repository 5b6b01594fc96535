"""Which algorithm is fastest: a cost model from shapes, rank and tolerance.

Times are modelled in milliseconds on one core of the CPU that the coefficients were fitted on, sizes 192 to 4096 and
ranks 8 to 128. Only the ratios matter, and those hold from one CPU to the next far better than the times.
`benchmarks/cost.py` fits the coefficients to another machine.
"""

from __future__ import annotations

import math

from .chebyshev import LOWEST_TOLERANCE, filter_width
from .krylov import block_width

EXACT_BELOW = 6e-7
"""Tolerances below this are below what fp32 products can certify."""

GIGA = 1e-9
"""Coefficients are milliseconds for 10⁹ multiply-adds."""

Terms = tuple[float, ...]
GRAM: Terms = (2.0, 18.0, 120.0, 4000.0, 80.0)
CHEBYSHEV: Terms = (2.6, 18.0, 350.0, 235.0, 10.0)
KRYLOV: Terms = (184.0, 380.0, 1.65)
"""Coefficients of the functions below of the same names; `benchmarks/cost.py` fits them to the machine at hand."""


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


def krylov_columns(rank: int, tolerance: float) -> int:
    """Columns after which real weights meet the tolerance: about 4.5r at 1e-3, 0.4r more for each further decade."""
    decades = max(0.0, math.log10(1e-3 / max(tolerance, EXACT_BELOW)))
    return int((3.0 + 0.4 * decades) * rank) + 3 * block_width(rank)


def gram_cost(m: int, n: int, rank: int) -> float:
    """Half of the product WᵀW, one eigenproblem, and W V."""
    return weighed(GRAM, gram_terms(m, n, rank))


def chebyshev_cost(m: int, n: int, columns: int) -> float:
    """Half of the product WᵀW, some ten products with G, two projections and one Cholesky factorisation."""
    return weighed(CHEBYSHEV, chebyshev_terms(m, n, columns))


def krylov_cost(m: int, n: int, rank: int, columns: int) -> float:
    """Products and projections, the checks of the core, and the small factorisations of each block."""
    return weighed(KRYLOV, krylov_terms(m, n, rank, columns))


def gram_terms(m: int, n: int, rank: int) -> Terms:
    """What the times of "gram" are made of."""
    return 1.0, GIGA * m * n**2, GIGA * n**3, GIGA * n**2, GIGA * m * n * rank


def chebyshev_terms(m: int, n: int, columns: int) -> Terms:
    """What the times of "chebyshev" are made of."""
    return 1.0, GIGA * m * n**2, GIGA * n**2 * columns, GIGA * n * columns**2, GIGA * n**3


def krylov_terms(m: int, n: int, rank: int, columns: int) -> Terms:
    """What the times of "krylov" are made of."""
    return GIGA * m * n * columns, GIGA * columns**3, columns / block_width(rank)


def weighed(coefficients: Terms, terms: Terms) -> float:
    """Milliseconds."""
    return sum(c * t for c, t in zip(coefficients, terms, strict=True))
