"""The one path from a matrix to `residual + scale · B · A`.

    W_res = W − s·B·A                                     (paper, section 3, equation 4)

Live models and checkpoints on disk are split by this function alone, so that both get the same bits. Everything is
computed in fp32; only the residual is rounded, once, to the dtype that W is stored in, and what that costs stands in
the certificate.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .config import PissaConfig, Quantization
from .decompose.certificate import Certificate
from .decompose.methods import FACTORS, Request
from .decompose.precision import full_precision
from .decompose.scale import magnitude, safe_exponent
from .decompose.svd import TruncatedSVD
from .errors import ConfigError, WeightError
from .quantize.alternate import Alternation, alternate, norm
from .quantize.error import matrix_norm, plain_error
from .quantize.formats import Packed
from .quantize.lowrank import OVERSAMPLING, singular_triplets
from .quantize.metric import Metric, metric

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_LINE = 64
BLOCK = 1 << 20
"""Elements of a block of rows that is widened to fp32 at once, so that a residual needs no fp32 copy of its weight."""
GPU_BLOCK = 1 << 24
"""The same on a GPU, which a small block would not fill."""


@dataclass(frozen=True)
class Split:
    """A weight (out, in) as a frozen residual and an initial adapter; `split_weight` makes it.

    Example:
        >>> import torch
        >>> from pissa import PissaConfig, split_weight
        >>> split = split_weight(torch.eye(8), PissaConfig(rank=2))
        >>> change = split.scale * split.B @ split.A  # what the adapter adds to the residual
        >>> torch.allclose(split.residual + change, torch.eye(8), atol=1e-5)
        True
    """

    A: Tensor
    """(r, in), fp32: `lora_A`."""
    B: Tensor
    """(out, r), fp32: `lora_B`."""
    scale: float
    """The factor before `B·A`, LoRA's `alpha / r`."""
    residual: Tensor
    """(out, in), in W's dtype; where quantised, what `packed` dequantises to, bit for bit."""
    certificate: Certificate
    """How good the factors are and what rounding or quantising the residual cost."""
    packed: Packed | None = None
    """The residual's codes and scales where it is quantised."""

    def restore(self) -> Tensor:
        """The weight again, `residual + scale·B·A`, (out, in) in the residual's dtype."""
        return combine(self.residual, self.A, self.B, self.scale)


class Weight(NamedTuple):
    """One weight of many, for `split_each`, and what is already known of it."""

    W: Tensor
    """(out, in)."""
    config: PissaConfig
    """Its own configuration."""
    name: str | None
    """The weight's name."""
    moment: Tensor | None = None
    """(in, in) second moment of the layer's input."""
    gradient: Tensor | None = None
    """(out, in), of the loss with respect to W."""
    largest: float | None = None
    """The largest magnitude in W where that has been looked up; NaN where W holds one."""
    svd: TruncatedSVD | None = None
    """An SVD with at least as many triplets as the rank, where there is one: of W, and the split takes its first ones;
    with a quantisation, of what the plain format leaves of W (in the moment's metric), and the split starts there."""


def split_weight(
    W: Tensor,
    config: PissaConfig,
    *,
    moment: Tensor | None = None,
    gradient: Tensor | None = None,
    name: str | None = None,
) -> Split:
    """Split one weight into residual and initial adapter.

    Args:
        W: (out, in), fp32, bf16 or fp16; never modified.
        config: rank, alpha, method, quantization and seed; whoever has patterns resolves them first, by
            `PissaConfig.for_module`.
        moment: (in, in), the second moment `E[xᵀx]` of the layer's input, for a quantisation that minimises output
            error.
        gradient: (out, in), of the loss with respect to W, for component "scored".
        name: the weight's name, for messages and so that random draws differ from weight to weight.

    Returns:
        The split; `split.restore()` equals W up to `split.certificate.rounding`.

    Raises:
        WeightError: W is not a finite matrix of a supported dtype, its residual does not fit into that dtype, or the
            moment is not one.
        ConfigError: the rank exceeds the smaller side of W, the gradient that is needed is missing, or a moment or
            gradient that nothing would use.

    Example:
        >>> import torch
        >>> from pissa import PissaConfig, split_weight
        >>> W = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
        >>> split = split_weight(W, PissaConfig(rank=4))
        >>> tuple(split.A.shape), tuple(split.B.shape), tuple(split.residual.shape)
        ((4, 32), (48, 4), (48, 32))
        >>> torch.allclose(split.restore(), W, atol=1e-5)
        True
    """
    return split_one(Weight(W, config, name, moment, gradient))


def split_one(weight: Weight) -> Split:
    """`split_weight`, for a weight of which something is already known."""
    W, config, name, moment, gradient, largest, svd = weight
    label = name or "the weight"
    largest = check(weight, label)
    with torch.no_grad(), full_precision():
        W = aligned(W.detach())
        request = Request(W.float(), config, derive_seed(config.seed, name), gradient, largest, svd)
        if config.quantization is not None:
            return quantized(W, request, config.quantization, moment, label)
        return unquantized(W, request, label)


def check(weight: Weight, label: str) -> float:
    """Refuse what cannot be split; returns the largest magnitude in the weight."""
    W, config, _, moment, gradient, largest, _ = weight
    if W.ndim != 2 or W.dtype not in STORAGE_DTYPES:
        already = "; it is quantised already" if W.dtype in (torch.uint8, torch.int8, torch.int32) else ""
        raise WeightError(
            f"{label} is {W.dtype} of shape {tuple(W.shape)}{already}; only a matrix in float32, bfloat16 or "
            "float16 can be split"
        )
    if config.rank > min(W.shape):
        raise ConfigError(f"rank {config.rank} exceeds {min(W.shape)}, the smaller side of {label} {tuple(W.shape)}")
    largest = magnitude(W) if largest is None else largest
    if not math.isfinite(largest):
        raise WeightError(f"{label} holds NaN or Inf; repair or reload the checkpoint before adapting it")
    unused = {"gradient": gradient is not None and not config.needs_gradient}
    unused["second moment"] = moment is not None and config.quantization is None
    for given in (name for name, is_unused in unused.items() if is_unused):
        raise ConfigError(f"a {given} was given for {label}, and this configuration does not use one; leave it out")
    if config.needs_gradient:
        check_gradient(W, gradient, label)
    if config.quantization is not None:
        check_quantization(W, config.quantization, moment, label)
    return largest


def check_gradient(W: Tensor, gradient: Tensor | None, label: str) -> None:
    """Refuse to score components without a usable gradient."""
    if gradient is None:
        raise ConfigError(
            f'component "scored" needs the gradient of the loss with respect to {label}; pass gradient (adapt: batches)'
        )
    if gradient.shape != W.shape or not bool(torch.isfinite(gradient).all()):
        what = "not finite" if gradient.shape == W.shape else f"of shape {tuple(gradient.shape)}"
        raise WeightError(f"the gradient given for {label} {tuple(W.shape)} is {what}")


def check_quantization(W: Tensor, config: Quantization, moment: Tensor | None, label: str) -> None:
    """Refuse what the format cannot hold or the method cannot do."""
    if config.rounding == "gptq" and moment is None:
        raise ConfigError(f'rounding "gptq" needs the second moment of the inputs of {label}; give calibration text')
    # Blocks that run over the end of a row are legal NF4, but bitsandbytes' CPU kernels read them with wrong scales.
    if config.format == "nf4" and W.shape[1] % config.block_size:
        raise WeightError(
            f"{label} {tuple(W.shape)} has {W.shape[1]} inputs, not a multiple of block_size {config.block_size}: "
            'take a smaller block_size, format "int8", or exclude the layer'
        )


def unquantized(W: Tensor, request: Request, label: str) -> Split:
    """The residual in W's dtype."""
    config, scale = request.config, request.scale
    try:
        A, B, certificate = FACTORS[config.method](request)
    except (ConfigError, WeightError) as error:
        raise type(error)(f"{label}: {error}") from error
    if certificate.residual_norm is not None and certificate.residual_norm > 1:
        warnings.warn(
            f"{label}: a bad draw, the residual's norm is {certificate.residual_norm:.3g} times the weight's; take "
            'another seed, a larger cur_rcond, or cur_core="optimal"',
            stacklevel=4,
        )
    A, B = A.contiguous(), B.contiguous()
    residual = W.clone() if config.starts_at_zero else combine(W, A, B, -scale)
    rounding = residual_error(W, residual, A, B, scale)
    if not math.isfinite(rounding):
        raise WeightError(f"{label} is too large: its residual overflows {W.dtype}; use a wider dtype")
    return Split(A, B, scale, residual, replace(certificate, rounding=rounding))


def aligned(W: Tensor) -> Tensor:
    """The weight where a matrix product rounds it as anywhere else: on CPUs its bits depend on how far from a cache
    line's beginning an fp32 matrix begins, and in a file that is mapped into memory it may begin anywhere."""
    return W.clone() if W.device.type == "cpu" and W.dtype == torch.float32 and W.data_ptr() % CACHE_LINE else W


def split_each(weights: Sequence[Weight]) -> Iterator[Split]:
    """Split many weights, in order; on a CPU several at a time, each on one thread.

    A factorisation of a weight's size gains little from a second thread, a second weight gains all of it; and the bits
    do not depend on how many threads there are.

    Args:
        weights: the matrices, each with what `split_weight` takes beside it.

    Raises:
        WeightError, ConfigError: as `split_weight`, for the first weight that cannot be split.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(weight.W.device.type != "cpu" for weight in weights):
        yield from map(split_one, weights)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(split_one, weights)
    finally:
        pool.shutdown(cancel_futures=True)
        # a thread's own count is also what threads yet to come begin with
        torch.set_num_threads(threads)


def quantized(W: Tensor, request: Request, quantization: Quantization, moment: Tensor | None, label: str) -> Split:
    """The residual in few bits, and the adapter that goes with it."""
    start, config, scale = time.perf_counter(), request.config, request.scale
    try:
        matters = None if moment is None else metric(moment.to(W.device), W.shape[1], name=label)
        found = alternate(
            request.W,
            config.rank,
            quantization,
            dtype=W.dtype,
            metric=matters,
            tolerance=config.tolerance,
            algorithm=config.algorithm,
            seed=request.seed,
            largest=request.largest,
            start=None if request.svd is None else request.svd.Vh[: config.rank + OVERSAMPLING].mT,
        )
        A, B = factors(request, found)
    except WeightError as error:
        raise error if label in str(error) else WeightError(f"{label}: {error}") from error
    residual = found.packed.dequantize()
    error = torch.addmm(W.float() - residual.float(), B, A, alpha=-scale)
    certificate = certify(W, error, found, time.perf_counter() - start, matters)
    if not math.isfinite(certificate.rounding):
        raise WeightError(f"{label} is too large: its residual overflows {W.dtype}; use a wider dtype")
    return Split(A, B, scale, residual, certificate, found.packed)


def factors(request: Request, found: Alternation) -> tuple[Tensor, Tensor]:
    """A and B with `s·B·A = L`, S shared evenly between them as in `pissa_factors`."""
    if found.low_rank is None:
        A, B, _ = FACTORS[request.config.method](request)
        return A.contiguous(), B.contiguous()
    U, S, Vh = singular_triplets(found.low_rank, request.rank)
    root = (S / request.scale).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def certify(W: Tensor, error: Tensor, found: Alternation, seconds: float, metric: Metric | None) -> Certificate:
    """What the quantised split cost."""
    total, left = matrix_norm(W, "frobenius"), matrix_norm(error, "frobenius")
    baseline = plain_error(W, found.packed)
    plain = matrix_norm(baseline, "frobenius")
    output = None
    if metric is not None:
        exponent = safe_exponent(magnitude(W))
        unfitted = norm(baseline, metric, exponent)
        output = 100 * (1 - found.errors[-1] / unfitted) if unfitted > 0 else 0.0
    svd = found.certificate or Certificate("subspace", 0, 0.0, 1.0, "upper bound")
    return replace(
        svd,
        seconds=seconds,
        rounding=left / total if total > 0 else 0.0,
        quantization_error=left,
        quantization_reduction=100 * (1 - left / plain) if plain > 0 else 0.0,
        output_reduction=output,
        iterations=found.iterations,
    )


def combine(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`W + scale·B·A`, computed in fp32 on W's device and rounded once to W's dtype; (out, in)."""
    A, B = (aligned(factor.to(W.device, torch.float32)) for factor in (A, B))
    out = torch.empty(W.shape, dtype=W.dtype, device=W.device)
    with full_precision():
        for rows in row_blocks(W):
            out[rows] = torch.addmm(W[rows].float(), B[rows], A, alpha=scale)
    return out


def residual_error(W: Tensor, residual: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    """`‖W − (residual + scale·B·A)‖ / ‖W‖` in the Frobenius norm; 0 for W = 0.

    Args:
        W: (out, in); residual: the same shape; A: (r, in) fp32; B: (out, r) fp32.
    """
    A, B = aligned(A.float()), aligned(B.float())
    norms, errors = [], []
    with full_precision():
        for rows in row_blocks(W):
            block = W[rows].float()
            again = torch.addmm(residual[rows].float(), B[rows], A, alpha=scale)
            norms.append(frobenius(block))
            errors.append(frobenius(again.sub_(block)))
    norm, error = math.hypot(*norms), math.hypot(*errors)
    return error / norm if norm > 0 else 0.0


def frobenius(E: Tensor) -> float:
    """The Frobenius norm: in fp32, and in fp64 where squares might leave fp32's range."""
    norm = float(torch.linalg.vector_norm(E))
    return norm if 1e-12 < norm < 1e15 else float(torch.linalg.vector_norm(E, dtype=torch.float64))


def row_blocks(W: Tensor) -> Iterator[slice]:
    """Slices of W's rows, each of about BLOCK elements, on a GPU of GPU_BLOCK."""
    step = max(1, (BLOCK if W.device.type == "cpu" else GPU_BLOCK) // max(1, W.shape[1]))
    return (slice(top, top + step) for top in range(0, W.shape[0], step))


def derive_seed(seed: int, name: str | None) -> int:
    """A weight's own seed: a fixed function of the run's seed and the weight's name."""
    digest = hashlib.sha256(f"{seed}:{name or ''}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
