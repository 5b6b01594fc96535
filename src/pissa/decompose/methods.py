"""The registry: a method's name -> the function that turns one matrix into its initial factors.

Every function has the same shape, `Request -> (A, B, certificate)`, with A (r, in), B (out, r) and `scale · B · A` the
part of W that becomes trainable. A new method is a file beside this one and a line in `FACTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..config import Method, PissaConfig
from .certificate import Certificate
from .components import chosen_triplets, random_triplets, shared
from .cur import cur_approximation
from .gaussian import random_factors
from .leading import leading_triplets
from .robust import l1_approximation
from .svd import TruncatedSVD, decompose


class Request(NamedTuple):
    """One weight whose initial factors are wanted. It is known to be finite, and its rank to fit."""

    W: Tensor
    """(out, in) fp32."""
    config: PissaConfig
    """Its own configuration, rank included."""
    seed: int
    """Of sketches and draws."""
    gradient: Tensor | None = None
    """(out, in), of the loss with respect to W; None where the configuration uses none."""
    largest: float | None = None
    """The largest magnitude in W; None where it is not known."""
    svd: TruncatedSVD | None = None
    """An SVD of W of at least as many components, where there is one already; None otherwise."""

    @property
    def rank(self) -> int:
        """r."""
        return self.config.rank

    @property
    def scale(self) -> float:
        """The factor before `B·A`."""
        return self.config.scale(self.config.rank, self.config.alpha)


Factors = tuple[Tensor, Tensor, Certificate]
FactorFunction = Callable[[Request], Factors]


def pissa_factors(request: Request) -> Factors:
    """PiSSA's initial adapter (paper, section 3, equations 2 and 3), or the same on other triplets (`components.py`).

        B = U[:, :r] · S[:r]^(1/2) / sqrt(s)        A = S[:r]^(1/2) · V[:, :r]ᵀ / sqrt(s)

    `s·B·A` is the best rank-r approximation of W, and sharing S evenly gives both factors equally large gradients.
    """
    W, config, seed, gradient, largest, svd = request
    if config.component != "principal":
        found = chosen_triplets(W, config.rank, config.component, gradient, largest)
    elif svd is not None:
        found = leading_triplets(svd, W, config.rank, config.tolerance, seed, largest)
    else:
        found = decompose(W, config.rank, config.tolerance, config.algorithm, seed, largest=largest)
    return shared(found, request.scale)


def random_pissa_factors(request: Request) -> Factors:
    """Random PiSSA, see `components.py`."""
    fraction = request.config.random_fraction
    return shared(random_triplets(request.W, request.rank, fraction, request.seed, request.largest), request.scale)


def cura_factors(request: Request) -> Factors:
    """CURA, see `cur.py`."""
    W, config, seed, *_ = request
    A, B, certificate = cur_approximation(
        W, config.rank, core=config.cur_core, rcond=config.cur_rcond, seed=seed, largest=request.largest
    )
    root = request.scale**0.5
    return A / root, B / root, certificate


def robust_factors(request: Request) -> Factors:
    """Robust PiSSA, see `robust.py`."""
    found = l1_approximation(request.W, request.rank, seed=request.seed, largest=request.largest)
    return shared(found, request.scale)


def kaiming_factors(request: Request) -> Factors:
    """LoRA as PEFT initialises it by default, see `gaussian.py`."""
    return _lora_factors(request, "kaiming")


def gaussian_factors(request: Request) -> Factors:
    """LoRA with a normally distributed A, see `gaussian.py`."""
    return _lora_factors(request, "gaussian")


def _lora_factors(request: Request, distribution: str) -> Factors:
    W = request.W
    A, B, certificate = random_factors(
        (W.shape[0], W.shape[1]),
        request.rank,
        distribution=distribution,  # pyright: ignore[reportArgumentType]
        seed=request.seed,
    )
    return A.to(W.device), B.to(W.device), certificate


FACTORS: dict[Method, FactorFunction] = {
    "pissa": pissa_factors,
    "random-pissa": random_pissa_factors,
    "cura": cura_factors,
    "robust-pissa": robust_factors,
    "lora-kaiming": kaiming_factors,
    "lora-gaussian": gaussian_factors,
}
