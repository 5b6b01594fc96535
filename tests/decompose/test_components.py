"""Which triplets: against the full SVD in fp64, and for scores against the loss itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from pissa.config import Component
from pissa.decompose.components import chosen_triplets, random_triplets
from pissa.decompose.svd import TruncatedSVD
from pissa.errors import ConfigError


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    """Random singular vectors and well separated singular values, k, k − 1, …, 1."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return ((U * torch.arange(k, 0, -1)) @ V.mT).float()


def taken(found: TruncatedSVD) -> list[int]:
    """Indices of the triplets in a `matrix`, read off their singular values."""
    largest = min(found.U.shape[0], found.Vh.shape[1])
    return [round(largest - float(value)) for value in found.S]


def product_of(W: Tensor, indices: list[int]) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, indices] * S[indices]) @ Vh[indices]


@pytest.mark.parametrize(("m", "n"), [(12, 9), (9, 12), (10, 10)])
@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("principal", lambda k, r: range(r)),
        ("medium", lambda k, r: range((k - r) // 2, (k - r) // 2 + r)),
        ("minor", lambda k, r: range(k - r, k)),
    ],
)
def test_components_are_the_named_triplets_of_the_exact_svd(m: int, n: int, component: Component, expected) -> None:
    for rank in (1, 3, min(m, n)):
        W = matrix(m, n)
        found = chosen_triplets(W, rank, component)
        indices = list(expected(min(m, n), rank))
        assert taken(found) == indices
        torch.testing.assert_close(
            ((found.U * found.S) @ found.Vh).double(), product_of(W, indices), rtol=1e-5, atol=1e-5
        )
        S = torch.linalg.svdvals(W.double())
        loss = 1 - float(S[indices].square().sum() / S[:rank].square().sum())
        assert found.certificate.captured_energy_loss == pytest.approx(loss, abs=1e-6)
        assert found.certificate.bound == "exact"


def test_scores_are_the_derivatives_of_the_loss_by_the_singular_values() -> None:
    W, target, x = matrix(8, 6), matrix(8, 6, seed=5), torch.randn(20, 6, generator=torch.Generator().manual_seed(1))

    def loss(weight: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(torch.tanh(x.double() @ weight.mT), x.double() @ target.double().mT)

    weight = W.double().requires_grad_()
    (G,) = torch.autograd.grad(loss(weight), weight)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    eps = 1e-4
    effects = [
        abs(float(loss(W.double() + eps * torch.outer(u, v)) - loss(W.double() - eps * torch.outer(u, v)))) / (2 * eps)
        for u, v in zip(U.mT, Vh, strict=True)
    ]
    for rank in (1, 2, 4):
        best = sorted(sorted(range(6), key=lambda i: -effects[i])[:rank])
        found = chosen_triplets(W, rank, "scored", G.float())
        assert taken(found) == best
        assert taken(chosen_triplets(W, rank, "scored", -1e-6 * G.float())) == best
    assert best != [0, 1, 2, 3], "the case must differ from PiSSA"


def test_triplets_of_equal_score_are_taken_largest_first() -> None:
    assert taken(chosen_triplets(matrix(7, 5), 3, "scored", torch.zeros(7, 5))) == [0, 1, 2]


def test_random_fraction_keeps_the_largest_and_draws_the_rest_beyond_the_rank() -> None:
    W, rank = matrix(30, 40), 6
    for fraction, drawn in ((0.0, 0), (0.5, 3), (0.6, 4), (1.0, 6)):
        for seed in range(5):
            indices = taken(random_triplets(W, rank, fraction, seed))
            assert indices == sorted(set(indices)) and len(indices) == rank
            assert indices[: rank - drawn] == list(range(rank - drawn))
            assert all(i >= rank for i in indices[rank - drawn :])


def test_draws_are_seeded_uniform_and_leave_the_global_generator_alone() -> None:
    W = matrix(12, 14)
    state = torch.get_rng_state()
    draws = [tuple(taken(random_triplets(W, 2, 1.0, seed))) for seed in range(600)]
    assert draws == [tuple(taken(random_triplets(W, 2, 1.0, seed))) for seed in range(600)]
    assert torch.equal(state, torch.get_rng_state())
    counts = Counter(index for draw in draws for index in draw)
    # 1200 draws of ten triplets: 120 each, standard deviation 10
    assert set(counts) == set(range(2, 12)) and all(abs(count - 120) < 45 for count in counts.values())


def test_without_enough_residual_triplets_random_pissa_says_so() -> None:
    with pytest.raises(ConfigError, match=r"rank 4 draws 4 triplets.*\(6, 9\) has 2 beyond the 4 largest"):
        random_triplets(matrix(6, 9), 4, 1.0, 0)
    assert taken(random_triplets(matrix(6, 9), 4, 0.5, 0))[2:] == [4, 5]
