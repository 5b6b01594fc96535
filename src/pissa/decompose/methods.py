"""The registry: a method's name -> the function that turns one matrix into its initial factors.

Every function has the same shape, `(W, rank, scale, config, seed, gradient) -> (A, B, certificate)`, with W (out, in)
in fp32, A (r, in), B (out, r) and `scale · B · A` the part of W that becomes trainable; the gradient (out, in) is None
where `config` uses none. A new method is a file beside this one and a line in `FACTORS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..config import Method, PissaConfig
from .certificate import Certificate
from .components import chosen_triplets, random_triplets, shared
from .cur import cur_approximation
from .gaussian import random_factors
from .robust import l1_approximation
from .svd import truncated_svd

Factors = tuple[Tensor, Tensor, Certificate]
FactorFunction = Callable[[Tensor, int, float, PissaConfig, int, Tensor | None], Factors]


def pissa_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """PiSSA's initial adapter (paper, section 3, equations 2 and 3), or the same on other triplets (`components.py`).

        B = U[:, :r] · S[:r]^(1/2) / sqrt(s)        A = S[:r]^(1/2) · V[:, :r]ᵀ / sqrt(s)

    `s·B·A` is the best rank-r approximation of W, and sharing S evenly gives both factors equally large gradients.
    """
    if config.component == "principal":
        found = truncated_svd(W, rank, tolerance=config.tolerance, algorithm=config.algorithm, seed=seed)
    else:
        found = chosen_triplets(W, rank, config.component, gradient)
    return shared(found, scale)


def random_pissa_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """Random PiSSA, see `components.py`."""
    return shared(random_triplets(W, rank, config.random_fraction, seed), scale)


def cura_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """CURA, see `cur.py`."""
    A, B, certificate = cur_approximation(W, rank, core=config.cur_core, rcond=config.cur_rcond, seed=seed)
    return A / scale**0.5, B / scale**0.5, certificate


def robust_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """Robust PiSSA, see `robust.py`."""
    return shared(l1_approximation(W, rank, seed=seed), scale)


def kaiming_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """LoRA as PEFT initialises it by default, see `gaussian.py`."""
    A, B, certificate = random_factors((W.shape[0], W.shape[1]), rank, distribution="kaiming", seed=seed)
    return A.to(W.device), B.to(W.device), certificate


def gaussian_factors(
    W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int, gradient: Tensor | None = None
) -> Factors:
    """LoRA with a normally distributed A, see `gaussian.py`."""
    A, B, certificate = random_factors((W.shape[0], W.shape[1]), rank, distribution="gaussian", seed=seed)
    return A.to(W.device), B.to(W.device), certificate


FACTORS: dict[Method, FactorFunction] = {
    "pissa": pissa_factors,
    "random-pissa": random_pissa_factors,
    "cura": cura_factors,
    "robust-pissa": robust_factors,
    "lora-kaiming": kaiming_factors,
    "lora-gaussian": gaussian_factors,
}
