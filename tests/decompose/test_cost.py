"""The cost model: never an algorithm that cannot meet the tolerance, and near the fastest where it is timed."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from spectra import with_spectrum

from pissa.decompose.cost import choose
from pissa.decompose.svd import truncated_svd


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


@pytest.mark.slow
def test_the_choice_is_at_most_half_again_as_slow_as_the_fastest():
    """CPU time of this thread, medians of five alternating repetitions; small differences are noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for m, n in ((576, 192), (384, 384), (1536, 576), (768, 768), (4096, 1024)):
            i = torch.arange(1, n + 1, dtype=torch.float64)
            W = with_spectrum((i + n / 16) ** -0.6, m, n)
            for rank in (8, 32, 64):
                times: dict[str, list[float]] = {"gram": [], "chebyshev": [], "krylov": []}
                for seed in range(5):
                    for algorithm in times:
                        start = time.thread_time()
                        truncated_svd(W, rank, algorithm=algorithm, seed=seed)
                        times[algorithm].append(time.thread_time() - start)
                medians = {name: statistics.median(values) for name, values in times.items()}
                best = min(medians.values())
                assert medians[choose(m, n, rank, 1e-3)] <= 1.5 * best + 2e-3, f"{m}x{n} rank {rank}: {medians}"
    finally:
        torch.set_num_threads(threads)
