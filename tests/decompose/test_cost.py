"""The cost model: never an algorithm that cannot meet the tolerance, and the one expected for each size.

How near its choices are to the fastest is timed by benchmarks/cost.py, not here.
"""

from __future__ import annotations

import pytest

from pissa.decompose.cost import choose


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [((576, 192), 64, "gram"), ((1536, 576), 64, "chebyshev"), ((4096, 4096), 128, "krylov"), ((40, 40), 40, "gram")],
)
def test_each_size_has_its_algorithm(shape, rank, expected):
    assert choose(shape[0], shape[1], rank, 1e-3) == expected


def test_small_tolerances_leave_only_algorithms_that_reach_them():
    for n in (64, 576, 1024, 4096):
        assert choose(n, n, 32, 1e-6) in ("gram", "krylov")
        assert choose(n, n, 32, 1e-7) == "exact"


def test_a_warm_start_is_for_krylov():
    assert choose(100, 100, 8, 1e-3, warm=True) == "krylov"
