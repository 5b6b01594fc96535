"""The registry: a method's name -> the function that turns one matrix into its initial factors.

Every function has the same shape, `(W, rank, scale, config, seed) -> (A, B, certificate)`, with W (out, in) in fp32,
A (r, in), B (out, r) and `scale · B · A` the part of W that becomes trainable. A new method is a file beside this one
and a line in `FACTORS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..config import Method, PissaConfig
from .certificate import Certificate
from .gaussian import random_factors
from .svd import truncated_svd

Factors = tuple[Tensor, Tensor, Certificate]
FactorFunction = Callable[[Tensor, int, float, PissaConfig, int], Factors]


def principal_factors(W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int) -> Factors:
    """PiSSA's initial adapter (paper, section 3, equations 2 and 3).

        B = U[:, :r] · S[:r]^(1/2) / sqrt(s)        A = S[:r]^(1/2) · V[:, :r]ᵀ / sqrt(s)

    `s·B·A` is the best rank-r approximation of W, and sharing S evenly gives both factors equally large gradients.
    """
    U, S, Vh, certificate = truncated_svd(W, rank, tolerance=config.tolerance, algorithm=config.algorithm, seed=seed)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root, certificate


def kaiming_factors(W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int) -> Factors:
    """LoRA as PEFT initialises it by default, see `gaussian.py`."""
    A, B, certificate = random_factors((W.shape[0], W.shape[1]), rank, distribution="kaiming", seed=seed)
    return A.to(W.device), B.to(W.device), certificate


def gaussian_factors(W: Tensor, rank: int, scale: float, config: PissaConfig, seed: int) -> Factors:
    """LoRA with a normally distributed A, see `gaussian.py`."""
    A, B, certificate = random_factors((W.shape[0], W.shape[1]), rank, distribution="gaussian", seed=seed)
    return A.to(W.device), B.to(W.device), certificate


FACTORS: dict[Method, FactorFunction] = {
    "pissa": principal_factors,
    "lora-kaiming": kaiming_factors,
    "lora-gaussian": gaussian_factors,
}
