"""LoRA's initial factors: `B = 0` and a random `A` (arXiv 2106.09685, section 4.1).

    kaiming    A ~ U(−b, b), b = sqrt(1 / in)      PEFT's default: Kaiming-uniform with a = sqrt(5)
    gaussian   A ~ N(0, 1 / r²)                    PEFT's `init_lora_weights="gaussian"`

`B·A = 0`, so the base is preserved and `∂L/∂A = s·Bᵀ(∂L/∂Y)ᵀX` is exactly zero at step 0: training first has to grow
`B` out of a random `A`, which is the slow start that PiSSA removes.
"""

from __future__ import annotations

import math
import time
from typing import Literal

import torch
from torch import Tensor

from .certificate import Certificate


def random_factors(
    shape: tuple[int, int], rank: int, *, distribution: Literal["kaiming", "gaussian"], seed: int
) -> tuple[Tensor, Tensor, Certificate]:
    """Draw LoRA's initial factors with a generator of their own.

    Args:
        shape: (out, in) of the weight.
        rank: r, the number of rows of A.
        distribution: what A is drawn from.
        seed: seed of the draw; the global generators are not touched.

    Returns:
        A (r, in) fp32, B (out, r) fp32 of zeros, and a certificate that says that nothing of W was captured.
    """
    start = time.perf_counter()
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)
    if distribution == "kaiming":
        bound = math.sqrt(1 / in_features)
        A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    else:
        A = torch.empty(rank, in_features).normal_(0, 1 / rank, generator=generator)
    B = torch.zeros(out_features, rank)
    seconds = time.perf_counter() - start
    return A, B, Certificate(distribution, 0, seconds, captured_energy_loss=1.0, bound="exact")
