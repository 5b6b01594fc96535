"""Residual and adapter fitted to each other by turns.

    min over Q in the format and L of rank r of ‖W − Q − L‖                   L = s·B·A

For fixed L the best Q rounds `W − L`, for fixed Q the best L is `SVD_r(W − Q)`. Published forms of the alternation,
T times:

    QPiSSA-T (paper, section 4):    L = SVD_r(E),  Q = nf4(W − L),  E = W − Q        from E = W;  ends on a quantisation
    LoftQ-T  (arXiv 2310.08659):    Q = nf4(W − L),  L = SVD_r(W − Q)                from L = 0;  ends on an SVD
    QLoRA    (arXiv 2305.14314):    Q = nf4(W),  L = 0

Ours adds what costs no byte and little time. A last SVD fits L to the Q that is stored. Scales are searched, of either
sign (`scales.py`). Momentum: rounding has dead zones, since a small change of L changes few codes, and plain
alternation stalls in them; so the next Q rounds `W − (L_t + β (L_t − L_{t−1}))`, which walks on through them. That
can overshoot, so the best iterate is kept; and the first that gains next to nothing is the last. Scales are searched
all over once, and then near those of the iterate before. With a second moment of the layer's input, scales and fits
are taken in its metric (`metric.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import Quantization
from ..decompose.certificate import Certificate
from ..decompose.scale import energy, magnitude, safe_exponent
from .formats import Packed, quantize_matrix, rounded_matrix
from .lowrank import LowRank, best_fit, extrapolated, in_metric, power_step, started
from .metric import Metric
from .nf4 import rounding_error

STALLED, STALLED_IN_METRIC = 0.005, 0.02
"""Share of the error by which an iteration has to lower it for another one to follow. In a metric, later ones gain less
on text held out than on the text of the fit."""
MOMENTUM, MOMENTUM_IN_METRIC = 0.9, 0.5
"""Where nothing else is said. In a metric the steps are uneven, and a large momentum stalls (docs/few-bits.md)."""


@dataclass(frozen=True)
class Alternation:
    """A quantised residual and the low-rank matrix that goes with it."""

    packed: Packed
    """The residual."""
    low_rank: LowRank | None
    """L, None for QLoRA."""
    errors: tuple[float, ...]
    """`‖W − Q_t − L_t‖` in the metric of the best iterate so far, after each iteration; where the last iterate is taken
    whatever its error, that of the last alone."""
    iterations: int
    """How many iterations the result took; later ones were no better."""
    certificate: Certificate | None = None
    """Of the last SVD; None where the method ends on a quantisation."""


def alternate(
    W: Tensor,
    rank: int,
    config: Quantization,
    *,
    dtype: torch.dtype,
    metric: Metric | None = None,
    tolerance: float = 1e-3,
    algorithm: str = "auto",
    seed: int = 0,
    largest: float | None = None,
    start: Tensor | None = None,
) -> Alternation:
    """Quantise W's residual and find the adapter for it.

    Args:
        W: (out, in) fp32.
        rank: of the adapter.
        config: format, method, iterations and everything else.
        dtype: that the residual dequantises to.
        metric: which errors matter; None for all alike.
        tolerance, algorithm, seed: of the last SVD, see `truncated_svd`. Those before it are subspace iterations, each
            started from the one before, unless the algorithm is "exact".
        largest: W's largest magnitude where it is known, which saves a look at every entry.

        start: (in, k), k ≥ rank: spans the leading right singular vectors, in the metric, of what the plain format
            leaves of W, where they are known; used where the method begins with a quantisation.
    """
    exponent = safe_exponent(magnitude(W) if largest is None else largest)
    found = iterates(W, rank, config, dtype, metric, algorithm, seed, exponent, start)
    count, packed, low_rank, error = next(found)
    best, errors = Alternation(packed, low_rank, (), count), [error]
    for count, packed, low_rank, error in found:
        before = errors[-1]
        if error < before:
            best = Alternation(packed, low_rank, (), count)
        errors.append(min(error, before))
        if error > (1 - (STALLED if metric is None else STALLED_IN_METRIC)) * before:
            break
    if config.refit and best.low_rank is not None:
        E = less(W, best.packed)
        L = best_fit(
            E, rank, metric, best.low_rank, tolerance=tolerance, algorithm=algorithm, seed=seed, exponent=exponent
        )
        if L.error <= errors[-1]:
            best, errors[-1] = replace(best, low_rank=L), L.error
        best = replace(best, certificate=L.certificate)
    return replace(best, errors=tuple(errors))


def iterates(
    W: Tensor,
    rank: int,
    config: Quantization,
    dtype: torch.dtype,
    metric: Metric | None,
    algorithm: str,
    seed: int,
    exponent: int,
    start: Tensor | None,
) -> Iterator[tuple[int, Packed, LowRank | None, float]]:
    """(t, Q_t packed, L_t, ‖W − Q_t − L_t‖) of every iterate that may be the result: t = 1 … T, or T alone."""

    def fit(E: Tensor, previous: LowRank | None) -> LowRank:
        if algorithm == "exact":
            return best_fit(E, rank, metric, previous, tolerance=0.0, algorithm=algorithm, seed=seed, exponent=exponent)
        return power_step(E, rank, metric, previous, seed, exponent)

    if config.method == "qlora":
        packed = quantize_matrix(W, config, dtype, metric)
        yield 1, packed, None, norm(less(W, packed), metric, exponent)
        return
    L = fit(W, None) if config.method == "qpissa" else None
    momentum = config.momentum
    if momentum is None:
        momentum = MOMENTUM if metric is None else MOMENTUM_IN_METRIC
    target, room, packed = L, None, None
    for step in range(config.iterations):
        if not config.keeps_best and step < config.iterations - 1:
            room = left_over(W, target, config, dtype, metric, exact=algorithm == "exact", room=room)
            target = L = fit(room, L if L is not None or start is None else started(start))
            continue
        R = W if target is None else target.subtract_from(W, out=room)
        again = step < config.iterations - 1
        packed = quantize_matrix(R, config, dtype, metric, near=packed, rough=packed is None and again)
        if not config.refit and step == config.iterations - 1:
            yield step + 1, packed, L, norm(less(R, packed), metric, exponent)
            return
        E = less(W, packed)
        previous, L = L, fit(E, L if L is not None or start is None else started(start))
        yield step + 1, packed, L, L.error
        target = L if previous is None or momentum == 0 else extrapolated(L, previous, momentum)


def left_over(
    W: Tensor,
    target: LowRank | None,
    config: Quantization,
    dtype: torch.dtype,
    metric: Metric | None,
    *,
    exact: bool,
    room: Tensor | None,
) -> Tensor:
    """`W − Q` (out, in) fp32 where Q rounds `W − L`, for a step whose codes nobody will ask for.

    Args:
        target: L, or None for 0.
        exact: round to the nearest value always, not only almost always.
        room: a result of this function that is no longer needed, to be written over.
    """
    plain = config.format == "nf4" and not config.double_quant and config.scale_search == "absmax"
    whole = W.is_contiguous() and W.shape[1] % config.block_size == 0
    if plain and config.rounding == "nearest" and whole and target is not None and not exact:
        room = torch.empty_like(W) if room is None else room
        return rounding_error(W, target.left, target.right, config.block_size, room)
    R = W if target is None else target.subtract_from(W)
    if exact:
        return W - quantize_matrix(R, config, dtype, metric).dequantize()
    return W - rounded_matrix(R, config, dtype, metric)


def less(W: Tensor, packed: Packed) -> Tensor:
    """`W − Q`, (out, in) fp32, in the memory of the dequantised matrix where that is fp32: fresh memory is slow."""
    Q = packed.dequantize()
    return torch.sub(W, Q, out=Q) if Q.dtype == torch.float32 else W - Q


def norm(E: Tensor, metric: Metric | None, exponent: int) -> float:
    """The Frobenius norm in the metric."""
    return float(energy(in_metric(E, metric, exponent)).sqrt()) * 2.0**-exponent
