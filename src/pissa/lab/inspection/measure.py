"""What a split would cost a model, measured and not changed: `pissa inspect`.

With a quantisation, by how much each method's error is below that of the plain format (paper, tables 4 and 8):

    reduction = (1 − ‖W − (Q + s·B·A)‖ / ‖W − format(W)‖) · 100 %

in the nuclear norm, the Frobenius norm and, with calibration text, as the error of the layer's output on text held out
from the fit, `sqrt(E ‖x Eᵀ‖²)`. Without one, what each layer's top components hold of its energy, and how far the
factors are from the best ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.progress import Progress
from torch import Tensor, nn

from ...config import PissaConfig
from ...quantize.error import matrix_norm, output_error, split_error
from ...quantize.formats import quantize_matrix
from ...split import split_weight
from .layers import kind_of, matrices_of, select_targets
from .text import Calibration, with_moments
from .variants import Variant

Measure = Literal["nuclear", "frobenius", "output"]


@dataclass(frozen=True)
class Measurement:
    """One weight, split one way."""

    layer: str
    kind: str
    variant: str
    rank: int
    errors: dict[Measure, float]
    """Norms of what the split leaves over."""
    plain: dict[Measure, float]
    """The same for the plain format."""
    seconds: float
    """How long the split took."""

    def reduction(self, measure: Measure) -> float:
        """By how many percent the error is below the plain format's; 0 where that has no error."""
        return 100 * (1 - self.errors[measure] / self.plain[measure]) if self.plain[measure] > 0 else 0.0


def inspect_quantized(
    model: nn.Module,
    variants: Sequence[Variant],
    ranks: Sequence[int],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    norms: Sequence[Measure] = ("nuclear", "frobenius"),
    calibration: Calibration | None = None,
    max_layers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far every method reduces the error of quantising a model.

    Args:
        model: in 16 or 32 bits; not changed.
        variants: the methods, all of one format.
        ranks: of the adapters; each method is measured at each.
        target_modules: as in `PissaConfig`.
        norms: "nuclear" (slow: all singular values) and "frobenius"; with calibration, "output" is added.
        calibration: text; needed by methods that are fitted to it.
        max_layers: only so many of the model's blocks, at even distances.
        seed: of the SVDs' sketches.
        progress: a bar to move.

    Returns:
        `rows`, one for each method, rank and norm: `method`, `rank`, `norm`, `by_kind` (kind of layer -> mean reduction
        in percent), `mean` (over all layers), `error` and `plain_error` (mean norms), `seconds` (of all splits);
        `layers`: how many there are; with text, `moments_seconds`: how long the second moments took, of both parts.

    Raises:
        PissaError: a layer that cannot be split, a rank too large, text too short.
    """
    targets = select_targets(model, _config(max(ranks), target_modules), max_layers)
    measures: list[Measure] = [*norms, *(["output"] if calibration is not None else [])]  # pyright: ignore[reportAssignmentType]
    task = None if progress is None else progress.add_task("splitting", total=len(targets), note="")
    found: list[Measurement] = []
    text = Timed(with_moments(model, targets, calibration))
    for target, fit, held_out in text:
        for name, W in matrices_of(target):
            found += measure_weight(name, W, variants, ranks, measures, fit, held_out, seed)
        if progress is not None and task is not None:
            progress.update(task, advance=1, note=target.name)
    rows = [
        row_of([m for m in found if (m.variant, m.rank) == (variant.name, rank)], measure)
        for rank in ranks
        for measure in measures
        for variant in variants
    ]
    taken = {"moments_seconds": text.seconds} if calibration is not None else {}
    return {"layers": len(targets), "rows": rows, **taken}


class Timed(Iterator[Any]):
    """Goes through an iterator and adds up how long it takes to give what comes next."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.seconds = 0.0

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds += time.perf_counter() - start


def inspect_split(
    model: nn.Module,
    rank: int,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the plain split of a model at this rank captures.

    Args:
        model, rank, target_modules, max_layers, progress: see `inspect_quantized`.

    Returns:
        `layers`: for each layer `name`, `kind`, `shape`, `rank`, `captured` (share of the squared Frobenius norm in the
        adapter, percent), `captured_energy_loss` with its `bound`, `rounding`, `algorithm`, `seconds`; `rows`: the same
        by kind, as `inspect_quantized` gives them, with `captured` in the place of the reduction.
    """
    targets = select_targets(model, _config(rank, target_modules), max_layers)
    count = sum(math.prod(target.place.matrix_shape[:-2]) for target in targets)
    task = None if progress is None else progress.add_task("splitting", total=count, note="")
    layers = []
    for name, W in (each for target in targets for each in matrices_of(target)):
        split = split_weight(W, PissaConfig(rank=rank), name=name)
        certificate = split.certificate
        total = float(W.double().square().sum())
        captured = float((split.B.mT @ split.B * (split.A @ split.A.mT)).double().sum()) * split.scale**2
        layers.append(
            {
                "name": name,
                "kind": kind_of(name),
                "shape": list(W.shape),
                "rank": rank,
                "captured": 100 * captured / total if total > 0 else 0.0,
                "captured_energy_loss": certificate.captured_energy_loss,
                "bound": certificate.bound,
                "rounding": certificate.rounding,
                "algorithm": certificate.algorithm,
                "seconds": certificate.seconds,
            }
        )
        if progress is not None and task is not None:
            progress.update(task, advance=1, note=name)
    row = {
        "method": "pissa",
        "rank": rank,
        "norm": "frobenius",
        "by_kind": mean_by_kind((layer["kind"], layer["captured"]) for layer in layers),
        "mean": statistics.fmean(layer["captured"] for layer in layers),
        "seconds": sum(layer["seconds"] for layer in layers),
    }
    return {"layers": layers, "rows": [row]}


def measure_weight(
    name: str,
    W: Tensor,
    variants: Sequence[Variant],
    ranks: Sequence[int],
    measures: Sequence[Measure],
    fit: Tensor | None,
    held_out: Tensor | None,
    seed: int,
) -> Iterator[Measurement]:
    """Split one weight (out, in) in every way; `fit` and `held_out` are second moments (in, in) of its input."""
    exact = quantize_matrix(W.float(), variants[0].plain, W.dtype).dequantize().float()
    baseline: dict[Measure, float] = {measure: size_of(W.float() - exact, measure, held_out) for measure in measures}
    for rank in ranks:
        for variant in variants:
            start = time.perf_counter()
            split = split_weight(W, variant.config(rank, seed), moment=fit if variant.aware else None, name=name)
            seconds = time.perf_counter() - start
            E = split_error(W, split)
            errors: dict[Measure, float] = {measure: size_of(E, measure, held_out) for measure in measures}
            yield Measurement(name, kind_of(name), variant.name, rank, errors, baseline, seconds)


def size_of(E: Tensor, measure: Measure, held_out: Tensor | None) -> float:
    """An error (out, in) as one number."""
    if measure == "output":
        assert held_out is not None
        return output_error(E, held_out)
    return matrix_norm(E, measure)


def row_of(found: Sequence[Measurement], measure: Measure) -> dict[str, Any]:
    """All layers of one method and rank in one norm."""
    return {
        "method": found[0].variant,
        "rank": found[0].rank,
        "norm": measure,
        "by_kind": mean_by_kind((m.kind, m.reduction(measure)) for m in found),
        "mean": statistics.fmean(m.reduction(measure) for m in found),
        "error": statistics.fmean(m.errors[measure] for m in found),
        "plain_error": statistics.fmean(m.plain[measure] for m in found),
        "seconds": sum(m.seconds for m in found),
    }


def mean_by_kind(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Kind of layer -> mean."""
    by_kind: dict[str, list[float]] = {}
    for kind, value in values:
        by_kind.setdefault(kind, []).append(value)
    return {kind: statistics.fmean(found) for kind, found in by_kind.items()}


def _config(rank: int, target_modules: str | Sequence[str]) -> PissaConfig:
    chosen = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    return PissaConfig(rank=rank, target_modules=chosen)
