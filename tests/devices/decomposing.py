"""Decompositions and splits of matrices on a device, against fp64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from registry import holds
from torch import Tensor

from pissa import PissaConfig, split_weight, truncated_svd
from pissa.config import METHODS
from pissa.decompose.orthogonal import orthonormalize
from pissa.decompose.svd import decompose

ALGORITHMS: tuple[Any, ...] = ("auto", "exact", "gram", "chebyshev", "krylov", "subspace")
SHAPES = ((150, 90), (90, 150), (120, 120))
RANK = 12
ORTHONORMAL = 1e-5
PROVABLE = 1e-3
"""The default tolerance."""


def decaying(m: int, n: int, seed: int = 0, power: float = -0.7) -> Tensor:
    """(m, n) fp32 on the CPU with singular values that fall like a power."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64))[0] for side in (m, n))
    return ((U * torch.arange(1, k + 1, dtype=torch.float64) ** power) @ V.T).float()


def loss_of(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """The true captured-energy loss, in fp64 on the CPU."""
    W, U, S, Vh = (each.cpu().double() for each in (W, U, S, Vh))
    best = float(torch.linalg.svdvals(W)[: len(S)].square().sum())
    captured = float(W.square().sum() - (W - (U * S) @ Vh).square().sum())
    return 1 - captured / best if best > 0 else 0.0


def check_triplets(W: Tensor, found: Any, device: torch.device, tolerance: float = PROVABLE) -> None:
    """Factors are on the device, orthonormal, ordered, and as good as the tolerance says."""
    U, S, Vh, certificate = found
    assert {U.device.type, S.device.type, Vh.device.type} == {device.type}
    for Q in (U.cpu().double(), Vh.cpu().double().T):
        assert float((Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max()) <= ORTHONORMAL
    values = S.cpu()
    assert bool((values[:-1] >= values[1:]).all()) and bool((values >= 0).all())
    assert loss_of(W, U, S, Vh) <= max(tolerance, 3e-6)
    assert certificate.captured_energy_loss <= max(tolerance, 2.5e-4)


@holds
def every_algorithm_meets_the_tolerance(device: torch.device) -> None:
    for algorithm in ALGORITHMS:
        for shape in SHAPES:
            W = decaying(*shape).to(device)
            check_triplets(W, truncated_svd(W, RANK, algorithm=algorithm), device)


@holds
def weights_of_16_bits_are_decomposed_to_fp32_accuracy(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        W = decaying(150, 90).to(device, dtype)
        check_triplets(W.float(), truncated_svd(W, RANK), device)


@holds
def a_batch_is_as_good_as_its_matrices(device: torch.device) -> None:
    for algorithm in ALGORITHMS:
        W = torch.stack([decaying(150, 90, seed) for seed in range(3)]).to(device)
        found = truncated_svd(W, RANK, algorithm=algorithm)
        for i, certificate in enumerate(found.certificate):
            check_triplets(W[i], (found.U[i], found.S[i], found.Vh[i], certificate), device)


@holds
def a_batch_of_all_magnitudes_is_as_good_as_its_matrices(device: torch.device) -> None:
    for algorithm in ALGORITHMS:
        sizes = (1.0, 2.0**-60, 2.0**60, 0.0)
        matrices = [decaying(150, 90, seed) * size for seed, size in enumerate(sizes)]
        found = truncated_svd(torch.stack(matrices).to(device), RANK, algorithm=algorithm)
        for i, (W, size) in enumerate(zip(matrices, sizes, strict=True)):
            S = found.S[i] / size if size else found.S[i]
            W = W / size if size else W
            check_triplets(W, (found.U[i], S, found.Vh[i], found.certificate[i]), device)


@holds
def bf16_products_lose_no_accuracy(device: torch.device) -> None:
    for shape in SHAPES:
        W = torch.stack([decaying(*shape, seed) for seed in range(2)]).to(device)
        found = decompose(W, RANK, PROVABLE, "krylov", 0, sketch=torch.bfloat16)
        for i, certificate in enumerate(found.certificate):
            check_triplets(W[i], (found.U[i], found.S[i], found.Vh[i], certificate), device)


@holds
def values_are_those_of_the_cpu(device: torch.device) -> None:
    W = decaying(120, 90)
    exact = torch.linalg.svdvals(W.double())[:RANK]
    for algorithm in ("exact", "gram"):
        found = truncated_svd(W.to(device), RANK, algorithm=algorithm)
        torch.testing.assert_close(found.S.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@holds
def transposed_and_strided_weights_are_decomposed(device: torch.device) -> None:
    whole = decaying(150, 180).to(device)
    for W in (whole.mT, whole[:, ::2], whole[5:105]):
        check_triplets(W, truncated_svd(W, RANK), device)


@holds
def hostile_matrices_get_complete_orthonormal_factors(device: torch.device) -> None:
    hostile = {
        "zero": torch.zeros(60, 40),
        "ones": torch.ones(60, 40),
        "rank 3": decaying(60, 3) @ decaying(3, 40),
        "equal values": torch.eye(60, 40),
        "large": decaying(60, 40) * 2.0**100,
        "small": decaying(60, 40) * 2.0**-100,
        "scales side by side": decaying(60, 40) * torch.logspace(-10, 10, 40),
    }
    for name, W in hostile.items():
        for algorithm in ALGORITHMS:
            U, S, Vh, _ = truncated_svd(W.to(device), 6, algorithm=algorithm)
            for Q in (U.cpu().double(), Vh.cpu().double().T):
                off = float((Q.T @ Q - torch.eye(6, dtype=Q.dtype)).abs().max())
                assert off <= ORTHONORMAL, f"{name}, {algorithm}: {off}"
            assert bool(torch.isfinite(S.cpu()).all()), f"{name}, {algorithm}"


@holds
def a_warm_start_is_taken_from_any_device(device: torch.device) -> None:
    W = decaying(150, 90).to(device)
    first = truncated_svd(W, RANK)
    for start in (first.Vh.mT, first.Vh.mT.cpu(), first.U):
        check_triplets(W, truncated_svd(W, RANK, warm_start=start), device)


@holds
def orthonormalisation_ends_with_an_orthonormal_block(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    basis, _, _ = orthonormalize(decaying(80, 10).to(device), None, generator)
    for Y in (decaying(80, 12, 1), torch.ones(80, 12), torch.zeros(80, 12), decaying(80, 12, 1) * 1e-25):
        Q, _, _ = orthonormalize(Y.to(device), basis, generator)
        Q, known = Q.cpu().double(), basis.cpu().double()
        assert float((Q.T @ Q - torch.eye(12, dtype=Q.dtype)).abs().max()) <= ORTHONORMAL
        assert float((known.T @ Q).abs().max()) <= ORTHONORMAL


@holds
def the_same_seed_gives_the_same_bits_and_global_generators_stay(device: torch.device) -> None:
    W = decaying(150, 90).to(device)
    before = torch.get_rng_state()
    there = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    for algorithm in ALGORITHMS:
        first, second = (truncated_svd(W, RANK, algorithm=algorithm, seed=3) for _ in range(2))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first[:3], second[:3], strict=True)), algorithm
    assert torch.equal(before, torch.get_rng_state())
    after = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert all(torch.equal(a, b) for a, b in zip(there, after, strict=True))


@holds
def every_method_splits_a_weight_that_the_split_restores(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        W = (decaying(96, 64) * 0.1).to(device, dtype)
        for method in METHODS:
            split = split_weight(W, PissaConfig(rank=8, method=method), name="a.weight")
            parts = {split.A.device.type, split.B.device.type, split.residual.device.type}
            assert parts == {device.type}, method
            apart = float(torch.dist(split.restore().cpu().double(), W.cpu().double()))
            bound = (1e-6 if dtype == torch.float32 else 1e-2) * float(W.cpu().double().norm())
            assert apart <= bound, f"{method}, {dtype}: {apart} > {bound}"


@holds
def other_components_are_split_off(device: torch.device) -> None:
    W, gradient = decaying(96, 64).to(device), decaying(96, 64, 5)
    for component in ("medium", "minor", "scored"):
        needs = component == "scored"
        for given in (gradient, gradient.to(device)) if needs else (None,):
            split = split_weight(W, PissaConfig(rank=8, component=component), gradient=given)
            assert float(torch.dist(split.restore().cpu(), W.cpu())) <= 1e-5
