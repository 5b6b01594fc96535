"""Robust PiSSA's Algorithm 1, as a comparison: gradient descent on the Huber loss, from random factors.

It has to find the subspace from nothing, at a speed that the condition of the factors limits, and torch's default
threshold of 1 makes the Huber loss of weights, which are far smaller than 1, the squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def huber_descent(
    W: Tensor,
    rank: int,
    *,
    iterations: int = 1000,
    learning_rate: float = 0.1,
    delta: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A rank-r approximation by the report's Algorithm 1, with Adam for the step that it leaves open.

    Args:
        W: (m, n).
        rank: r.
        iterations: steps.
        learning_rate: Adam's.
        delta: where the Huber loss turns from squares to absolute values; 1 is torch's default.
        seed: of the random factors, standard normal.

    Returns:
        A (r, n) and B (m, r), fp32.
    """
    W = W.detach().float()
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, W.shape[1]), (W.shape[0], rank))
    factors = [torch.randn(shape, generator=generator).to(W.device).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(factors, lr=learning_rate)
    A, B = factors
    with torch.enable_grad():
        for _ in range(iterations):
            optimizer.zero_grad()
            torch.nn.functional.huber_loss(B @ A, W, delta=delta).backward()
            optimizer.step()
    return A.detach(), B.detach()
