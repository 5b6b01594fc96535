"""Matrices that trained models have, and those that nobody wants."""

from __future__ import annotations

import torch
from torch import Tensor


def trained_like(out: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with a few strong directions over noise, in the magnitude of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, n)
    strong = torch.randn(out, k, generator=generator) * torch.arange(1, k + 1) ** -0.7
    noise = torch.randn(out, n, generator=generator)
    return (0.02 * (strong @ torch.randn(k, n, generator=generator) + noise)).to(dtype)


def second_moment(n: int, tokens: int, seed: int = 0) -> Tensor:
    """E[xᵀx] of `tokens` correlated inputs, some of them far stronger than others; rank min(n, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.logspace(0.5, -0.5, n)
    x = torch.randn(tokens, n, generator=generator) @ mixing
    return x.mT @ x / tokens


def awkward(kind: str, out: int = 24, n: int = 128) -> Tensor:
    """A matrix that a quantiser can stumble over."""
    W = trained_like(out, n, seed=7)
    if kind == "zero":
        return torch.zeros(out, n)
    if kind == "zero blocks":
        W[:, :64] = 0
    if kind == "constant blocks":
        W[: out // 2] = 0.25
        W[out // 2 :, :64] = -0.5
    if kind == "outliers":
        W[3, 5], W[9, 100] = 50.0, -80.0
    if kind == "tiny":
        W *= 1e-30
    if kind == "huge":
        W *= 1e30
    if kind == "mixed":
        W[0, 0], W[1, 1] = 1e30, 1e-30
    return W


AWKWARD = ("zero", "zero blocks", "constant blocks", "outliers", "tiny", "huge", "mixed")
