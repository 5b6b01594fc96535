"""The one path from a matrix to `residual + scale · B · A`.

    W_res = W − s·B·A                                     (paper, section 3, equation 4)

Live models and checkpoints on disk are split by this function alone, so that both get the same bits. Everything is
computed in fp32; only the residual is rounded, once, to the dtype that W is stored in, and what that costs stands in
the certificate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import PissaConfig
from .decompose.certificate import Certificate
from .decompose.methods import FACTORS
from .errors import ConfigError, WeightError

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Split:
    """A weight (out, in) as a frozen residual and an initial adapter."""

    A: Tensor
    """(r, in), fp32: `lora_A`."""
    B: Tensor
    """(out, r), fp32: `lora_B`."""
    scale: float
    """The factor before `B·A`, LoRA's `alpha / r`."""
    residual: Tensor
    """(out, in), in W's dtype."""
    certificate: Certificate
    """How good the factors are and what rounding the residual cost."""

    def restore(self) -> Tensor:
        """The weight again, `residual + scale·B·A`, (out, in) in the residual's dtype."""
        return combine(self.residual, self.A, self.B, self.scale)


def split_weight(W: Tensor, config: PissaConfig, *, name: str | None = None) -> Split:
    """Split one weight into residual and initial adapter.

    Args:
        W: (out, in), fp32, bf16 or fp16; never modified.
        config: rank, alpha, method, seed; patterns are the caller's to resolve (`PissaConfig.for_module`).
        name: the weight's name, for messages and so that random draws differ from weight to weight.

    Returns:
        The split; `split.restore()` equals W up to `split.certificate.rounding`.

    Raises:
        WeightError: W is not a finite matrix of a supported dtype, or its residual does not fit into that dtype.
        ConfigError: the rank exceeds the smaller side of W.
    """
    label = name or "the weight"
    if W.ndim != 2 or W.dtype not in STORAGE_DTYPES:
        raise WeightError(
            f"{label} is {W.dtype} of shape {tuple(W.shape)}; a matrix in float32, bfloat16 or float16 can be split"
        )
    if config.rank > min(W.shape):
        raise ConfigError(f"rank {config.rank} exceeds {min(W.shape)}, the smaller side of {label} {tuple(W.shape)}")
    if not bool(torch.isfinite(W).all()):
        raise WeightError(f"{label} holds NaN or Inf; repair or reload the checkpoint before adapting it")

    scale = config.scale(config.rank, config.alpha)
    with torch.no_grad():
        A, B, certificate = FACTORS[config.method](
            W.detach().float(), config.rank, scale, config, derive_seed(config.seed, name)
        )
        A, B = A.contiguous(), B.contiguous()
        residual = W.detach().clone() if config.starts_at_zero else combine(W.detach(), A, B, -scale)
        rounding = relative_error(W.detach(), combine(residual.float(), A, B, scale))
    if not math.isfinite(rounding):
        raise WeightError(f"{label} is too large: its residual overflows {W.dtype}; use a wider dtype")
    return Split(A, B, scale, residual, replace(certificate, rounding=rounding))


def split_each(weights: Sequence[tuple[Tensor, PissaConfig, str]]) -> Iterator[Split]:
    """Split many weights, in order; on a CPU several at a time, each on one thread.

    A factorisation of a weight's size gains little from a second thread, a second weight gains all of it; and the bits
    do not depend on how many threads there are.

    Args:
        weights: what `split_weight` takes: matrix, configuration, name.

    Raises:
        WeightError, ConfigError: as `split_weight`, for the first weight that cannot be split.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(W.device.type != "cpu" for W, _, _ in weights):
        yield from (split_weight(W, config, name=name) for W, config, name in weights)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(lambda weight: split_weight(weight[0], weight[1], name=weight[2]), weights)
    finally:
        pool.shutdown(cancel_futures=True)
        # a thread's own count is also what threads yet to come begin with
        torch.set_num_threads(threads)


def combine(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`W + scale·B·A`, computed in fp32 and rounded once to W's dtype; (out, in)."""
    return torch.addmm(W.float(), B.float(), A.float(), alpha=scale).to(W.dtype)


def relative_error(W: Tensor, approximation: Tensor) -> float:
    """`‖W − approximation‖ / ‖W‖` in the Frobenius norm; 0 for W = 0."""
    norm = torch.linalg.vector_norm(W.float())
    return float(torch.linalg.vector_norm(W.float() - approximation) / norm) if norm > 0 else 0.0


def derive_seed(seed: int, name: str | None) -> int:
    """A weight's own seed: a fixed function of the run's seed and the weight's name."""
    digest = hashlib.sha256(f"{seed}:{name or ''}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
