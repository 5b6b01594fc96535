"""The rivals of our l1 approximation: what they find, and that a seed decides it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa.decompose.robust import l1_approximation
from studies.huber_descent import huber_descent
from studies.l1_sketch import cauchy_sketch

EXAMPLE = torch.tensor([[3.0, 0, 0], [0, 1, 1], [0, 1, 1]])
"""The report's: the SVD of rank 1 leaves an error of 4, the l1 optimum 3."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def l1(W: Tensor, approximation: Tensor) -> float:
    return float((W.double() - approximation.double()).abs().sum())


def l1_of_ours(W: Tensor, rank: int) -> float:
    found = l1_approximation(W, rank)
    return l1(W, (found.U * found.S) @ found.Vh)


def test_algorithm_1_solves_the_report_s_example() -> None:
    A, B = huber_descent(EXAMPLE, 1, delta=0.01, learning_rate=0.02, iterations=2000)
    assert l1(EXAMPLE, B @ A) == pytest.approx(3, abs=0.1)


def test_ours_is_better_than_algorithm_1_on_outliers_in_far_fewer_products() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.1 * (normal(60, 6) @ normal(6, 50, seed=1) + torch.empty(60, 50).cauchy_(generator=generator))
    A, B = huber_descent(W, 6, iterations=600, delta=0.01, learning_rate=0.03)
    assert l1_of_ours(W, 6) <= l1(W, B @ A)


def test_algorithm_1_and_the_sketch_are_seeded_and_leave_the_global_generator_alone() -> None:
    W, state = normal(20, 16), torch.get_rng_state()
    for solver in (lambda seed: huber_descent(W, 3, iterations=5, seed=seed), lambda s: cauchy_sketch(W, 3, seed=s)):
        first, again, other = solver(1), solver(1), solver(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())


def test_the_cauchy_sketch_reproduces_rank_r_and_bounds_the_error_otherwise() -> None:
    L = normal(60, 4) @ normal(4, 40, seed=1)
    A, B = cauchy_sketch(L, 4)
    assert A.shape == (4, 40) and B.shape == (60, 4)
    torch.testing.assert_close(B @ A, L, rtol=1e-3, atol=1e-3)
    W = L + 0.1 * normal(60, 40, seed=2)
    for seed in range(5):
        A, B = cauchy_sketch(W, 4, seed=seed)
        best = l1_of_ours(W, 4)
        assert best < l1(W, B @ A) < 20 * best
