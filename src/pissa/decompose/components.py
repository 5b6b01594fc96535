"""Other triplets than the largest: medium, minor, random and scored components.

    s·B·A = Σ_{i ∈ I} σᵢ uᵢ vᵢᵀ        for any r of the k = min(m, n) singular triplets of W

preserves the function as well as PiSSA's I = {1, …, r} does; which r are best to train is an empirical question.

    medium   the r triplets in the middle   } the paper's appendix F: on three 7B models training loss is
    minor    the r smallest                 } principal < medium < minor
    random   some of the r slots drawn, without replacement, from the triplets beyond the r largest, so that a new task
             may also use directions that the old one hardly did (Random PiSSA, the report's section 3)
    scored   the r triplets whose singular value the loss depends on most, on data of the new task:

                 ∂L/∂σᵢ = uᵢᵀ G vᵢ,    G = ∂L/∂W          so that    |L(σᵢ + ε) − L(σᵢ)| ≈ ε·|uᵢᵀ G vᵢ|

"scored" replaces PiSSA's assumption that the new task needs what the old one needed most by a look at the new task.
All of these need triplets that are not the largest, and so the exact SVD.

Shapes: W (m, n), U (m, r), S (r,), Vh (r, n), I sorted, so that S descends.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..config import Component
from ..errors import ConfigError
from .certificate import Certificate
from .svd import TruncatedSVD, decompose


def chosen_triplets(
    W: Tensor, rank: int, component: Component, gradient: Tensor | None = None, largest: float | None = None
) -> TruncatedSVD:
    """The middle, the smallest, or the highest scored triplets.

    Args:
        W: (m, n), any float dtype.
        rank: r, 1 to min(m, n).
        component: "principal", "medium", "minor" or "scored".
        gradient: (m, n), for "scored"; its scale does not matter.
        largest: W's largest magnitude where it is known, which saves a look at every entry.

    Returns:
        U (m, r), S (r,) descending, Vh (r, n), fp32, and the certificate.
    """
    start = time.perf_counter()
    whole = decompose(W, min(W.shape), 0.0, "exact", 0, largest=largest)
    count = len(whole.S)
    if component == "scored":
        if gradient is None:
            raise ConfigError('component "scored" needs the gradient of the loss with respect to the weight')
        # a stable sort: triplets of equal score are taken largest first
        indices = scores(whole, gradient).argsort(descending=True, stable=True)[:rank].sort().values
    else:
        first = {"principal": 0, "medium": (count - rank) // 2, "minor": count - rank}[component]
        indices = torch.arange(first, first + rank, device=W.device)
    return _taken(whole, indices, start)


def random_triplets(W: Tensor, rank: int, fraction: float, seed: int, largest: float | None = None) -> TruncatedSVD:
    """The largest triplets with some replaced by triplets drawn from beyond the r largest.

    Args:
        W: (m, n), any float dtype.
        rank: r.
        fraction: in [0, 1]; `round(fraction · r)` triplets are drawn, uniformly and without replacement.
        seed: of the draw; the global generators are not touched.
        largest: W's largest magnitude where it is known, which saves a look at every entry.

    Returns:
        U (m, r), S (r,) descending, Vh (r, n), fp32, and the certificate.

    Raises:
        ConfigError: W has fewer triplets beyond the r largest than are to be drawn.
    """
    start = time.perf_counter()
    drawn, beyond = slots_drawn(rank, fraction), min(W.shape) - rank
    if drawn > beyond:
        raise ConfigError(
            f"random_fraction {fraction:g} of rank {rank} draws {drawn} triplets, and a weight of shape "
            f"{tuple(W.shape)} has {beyond} beyond the {rank} largest; lower random_fraction or the rank"
        )
    whole = decompose(W, min(W.shape), 0.0, "exact", 0, largest=largest)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(beyond, generator=generator)[:drawn].sort().values + rank
    return _taken(whole, torch.cat([torch.arange(rank - drawn), picked]).to(W.device), start)


def slots_drawn(rank: int, fraction: float) -> int:
    """How many of r triplets Random PiSSA draws."""
    return round(fraction * rank)


def scores(whole: TruncatedSVD, gradient: Tensor) -> Tensor:
    """`|uᵢᵀ G vᵢ|` for every triplet, (k,) fp32: how fast the loss changes with each singular value."""
    G = gradient.to(whole.U)
    return ((whole.U.mT @ G) * whole.Vh).sum(1).abs()


def shared(found: TruncatedSVD, scale: float) -> tuple[Tensor, Tensor, Certificate]:
    """A (r, in), B (out, r) with `scale·B·A = U·diag(S)·Vh`, S shared evenly between them; and the certificate."""
    root = (found.S / scale).sqrt()
    return root[:, None] * found.Vh, found.U * root, found.certificate


def _taken(whole: TruncatedSVD, indices: Tensor, start: float) -> TruncatedSVD:
    energies = whole.S.double().square()
    best = float(energies[: len(indices)].sum())
    loss = 1 - float(energies[indices].sum()) / best if best > 0 else 0.0
    certificate = Certificate("exact", 0, time.perf_counter() - start, max(loss, 0.0), "exact")
    return TruncatedSVD(whole.U[:, indices], whole.S[indices], whole.Vh[indices], certificate)
