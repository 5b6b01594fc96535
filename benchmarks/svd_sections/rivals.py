"""Truncated SVDs by one signature, the loss of their factors, and how they take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pissa import truncated_svd

Rival = Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


def ours(**settings: Any) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        return truncated_svd(W, rank, seed=seed, **settings)[:3]

    return run


def torch_exact(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def torch_lowrank(niter: int) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
        return U, S, V.T

    return run


def sklearn_randomized(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(W.numpy(), rank, random_state=seed)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)


def scipy_svds(solver: str) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        from scipy.sparse.linalg import svds

        U, S, Vh = (np.asarray(part) for part in svds(W.numpy(), rank, solver=solver, rng=seed))
        order = np.argsort(-S)
        return (
            torch.from_numpy(U[:, order].copy()),
            torch.from_numpy(S[order].copy()),
            torch.from_numpy(Vh[order].copy()),
        )

    return run


FAST: dict[str, Rival] = {
    "pissa 1e-3": ours(),
    "pissa 1e-2": ours(tolerance=1e-2),
    "pissa 2e-4": ours(tolerance=2e-4),
    "pissa 1e-6": ours(tolerance=1e-6),
    "svd_lowrank niter 1": torch_lowrank(1),
    "svd_lowrank niter 4": torch_lowrank(4),
    "svd_lowrank niter 16": torch_lowrank(16),
    "sklearn randomized_svd": sklearn_randomized,
}
SLOW: dict[str, Rival] = {
    "torch.linalg.svd": torch_exact,
    "scipy arpack": scipy_svds("arpack"),
    "scipy propack": scipy_svds("propack"),
}


def energy_loss(W: Tensor, values: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Captured-energy loss of factors with orthonormal U and V, 1 − Σ(2 s_i uᵢᵀW vᵢ − s_i²) / Σσᵢ²."""
    U, S, Vh = (x.double() for x in factors)
    inner = ((U.float().T @ W) * Vh.float()).double().sum(1)
    best = values[: len(S)].double().square().sum()
    return float(1 - (2 * S * inner - S.square()).sum() / best)


def rotated(rivals: dict[str, Any], by: int) -> list[tuple[str, Any]]:
    """The rivals in an order that begins with another one each time, so that none always follows the same."""
    names = [*rivals]
    at = by % len(names)
    return [(name, rivals[name]) for name in names[at:] + names[:at]]


def settle() -> None:
    """Let the thread pool of the rival before go to sleep: for a while its threads spin, and take a core each."""
    time.sleep(0.3)
