"""Matrices with known spectra, and the oracle: torch's exact SVD in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) fp32 with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return ((U * values.double()) @ V.T).float()


def white_noise(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def spectra(k: int) -> dict[str, Tensor]:
    """Decays of length k that a weight matrix, or a bad day, can have."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "1/i": 1 / i,
        "1/sqrt(i)": i**-0.5,
        "i^-0.2": i**-0.2,
        "fast": torch.exp(-i / 6),
        "slow": torch.exp(-i / (k / 4)),
        "step": torch.where(i <= k / 6, 1.0, 1e-2),
        "clusters": torch.where(i <= k / 5, 1.0, torch.where(i <= k / 2, 0.5, 0.2)),
        "near-clusters": torch.where(i <= k / 5, 1.0, 0.6) * (1 - 1e-4 * i / k),
        "spiked": torch.where(i <= 3, 30.0, 1 - 0.5 * i / k),
        "deficient": torch.where(i <= k / 3, 1 / i, 0.0),
        "flat": torch.ones(k),
    }


def zoo(seeds: range, turn: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every decay, white and heavy-tailed noise, in wide, tall and square shapes.

    Args:
        seeds: each makes all of them anew.
        turn: 0, 1 or 2: only a third, each kind in one shape; the three turns are the whole. None for the whole.
    """
    for seed in seeds:
        for number, (name, W) in enumerate(_matrices(seed)):
            if turn is None or number % 3 == turn:
                yield name, W


@cache
def _matrices(seed: int) -> list[tuple[str, Tensor]]:
    """13 kinds in 3 shapes, shape by shape: every third one is of each kind once."""
    found: list[tuple[str, Tensor]] = []
    for m, n in ((260, 200), (180, 320), (230, 230)):
        kinds = {name: with_spectrum(values, m, n, seed) for name, values in spectra(min(m, n)).items()}
        noise = white_noise(m, n, seed)
        kinds |= {"white": noise, "heavy-tailed": noise**3}
        found += [(f"{name} {m}x{n} seed {seed}", W) for name, W in kinds.items()]
    assert len(found) % 9 == 3  # 13 is no multiple of 3, so a kind's three shapes have three turns
    return found


def optimal_energy(W: Tensor, rank: int) -> float:
    """What the best rank-r approximation captures, from the exact fp64 SVD."""
    return float(torch.linalg.svdvals(W.double())[:rank].square().sum())


def energy_loss(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, best: float | None = None) -> float:
    """The true captured-energy loss of factors, in fp64."""
    W = W.double()
    residual = W - (U.double() * S.double()) @ Vh.double()
    captured = W.square().sum() - residual.square().sum()
    best = optimal_energy(W, S.shape[-1]) if best is None else best
    return float(1 - captured / best) if best > 0 else 0.0


def deviation_from_identity(Q: Tensor) -> float:
    """`max |QᵀQ − I|`."""
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().max())
