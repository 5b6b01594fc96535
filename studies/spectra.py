"""Is the residual easier to quantise: narrower, closer to a Gaussian, without the large singular values?

For every linear layer, W and its residual W_res at the paper's share of the width (rank 128 of 4096: hidden size / 32)
are described by their values' Gaussian fit (mean, sigma), by the degrees of freedom of a Student-t fit (more is closer
to a Gaussian), by the excess kurtosis, and by singular values. One matrix is shown in full, with both NF4 errors.
Nothing is drawn at random: intervals are over a model's layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pissa.colours import LIGHT
from pissa.config import PissaConfig, quantization_preset
from pissa.errors import MissingExtraError
from pissa.lab.inspection.layers import kind_of
from pissa.quantize.error import matrix_norm
from pissa.quantize.formats import quantize_matrix
from pissa.split import split_weight

from .figures import new_figure
from .interval import Interval, mean_interval
from .judge import verdict_of
from .study import Outcome, Settings, Study, model_name
from .weights import loaded, models

NAME = "spectra"
SAMPLE = 50_000
"""Values of a matrix that a Student-t is fitted to."""
SHOWN = 160
"""Points of a curve in the figure."""


def run(settings: Settings) -> Outcome:
    """Describe W and W_res of every linear layer."""
    sources, remark = models(settings)
    blocks = settings.pick(quick=2, default=None, full=None)
    keys = [
        {"source": model_name(source), "layer": layer} for source in sources for layer in layer_names(source, blocks)
    ]
    paths = {model_name(source): source for source in sources}
    rows = settings.grid(NAME, keys, lambda source, layer: describe(paths[source], layer))
    summary = {source: summarise([row for row in rows if row["source"] == source]) for source in paths}
    example = spectrum_of(*example_layer(sources[0]))
    parts = {name: part for source in paths for name, part in parts_of(rows, source).items()}
    listed = {name: part.as_dict() for name, part in parts.items()}
    results = {"layers": rows, "summary": summary, "parts": listed, "example": example}
    return Outcome(results, verdict_of(parts), f"{figures_of(summary)}{remark}")


def figures_of(summary: Mapping[str, Any]) -> str:
    """Sigma, mean and degrees of freedom of every model."""
    return "; ".join(
        f"{source}: sigma {part['sigma_ratio']:.3f} of W's (narrower in {part['narrower']:.0%} of {part['layers']} "
        f"layers), |mean| smaller in {part['mean_nearer_zero']:.0%}, Student-t degrees of freedom "
        f"{part['freedom']:.1f} → {part['freedom_residual']:.1f} (median; larger in {part['closer_to_gaussian']:.0%})"
        for source, part in summary.items()
    )


def parts_of(rows: Sequence[Mapping[str, Any]], source: str) -> dict[str, Interval]:
    """What the claim says of a model, each part as a difference over its layers that should be positive."""
    pairs = [(row["W"], row["residual"]) for row in rows if row["source"] == source]
    differences = {
        "sigma, 1 − W_res / W": [1 - residual["sigma"] / W["sigma"] for W, residual in pairs],
        "log10 of Student-t degrees of freedom, W_res − W": [
            math.log10(residual["student_freedom"] / W["student_freedom"]) for W, residual in pairs
        ],
        "excess kurtosis, |W| − |W_res|": [
            abs(W["excess_kurtosis"]) - abs(residual["excess_kurtosis"]) for W, residual in pairs
        ],
        "largest singular value, 1 − W_res / W": [
            1 - residual["largest_singular_value"] / W["largest_singular_value"] for W, residual in pairs
        ],
    }
    return {f"{source}: {name}": mean_interval(values) for name, values in differences.items()}


def layer_names(source: str, blocks: int | None) -> list[str]:
    """All linear layers, or those of the first blocks only."""
    names = list(loaded(source))
    return names if blocks is None else names[: 7 * blocks]


def describe(source: str, layer: str) -> dict[str, Any]:
    """One layer's W and W_res in numbers."""
    W, rank = loaded(source)[layer]
    residual = residual_of(W, rank)
    nf4 = [nuclear_error(matrix) for matrix in (W, residual)]
    return {
        "kind": kind_of(layer),
        "rank": rank,
        "W": values_fit(W),
        "residual": values_fit(residual),
        "nf4_error": nf4[0],
        "nf4_error_residual": nf4[1],
    }


def residual_of(W: Tensor, rank: int) -> Tensor:
    """W without its principal part, from the exact SVD."""
    return split_weight(W, PissaConfig(rank=rank, algorithm="exact")).residual


def nf4_error(W: Tensor) -> Tensor:
    """W − nf4(W)."""
    plain = quantization_preset("qlora", format="nf4", double_quant=False)
    return W - quantize_matrix(W, plain, W.dtype).dequantize()


def nuclear_error(W: Tensor) -> float:
    """‖W − nf4(W)‖_*."""
    return matrix_norm(nf4_error(W), "nuclear")


def values_fit(W: Tensor) -> dict[str, float]:
    """A matrix's values as a Gaussian and as a Student-t, and its singular values' extremes."""
    values = W.double().flatten()
    centred = values - values.mean()
    freedom, scale = student_t(values)
    singular = torch.linalg.svdvals(W)
    return {
        "mean": float(values.mean()),
        "sigma": float(values.std(correction=0)),
        "excess_kurtosis": float(centred.pow(4).mean() / centred.square().mean().square() - 3),
        "student_freedom": freedom,
        "student_scale": scale,
        "largest_singular_value": float(singular[0]),
        "median_singular_value": float(singular.median()),
    }


def student_t(values: Tensor) -> tuple[float, float]:
    """Degrees of freedom and scale of the most likely Student-t, centred at 0, of evenly spaced sample values."""
    try:
        from scipy.optimize import minimize_scalar
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError("fits need scipy: pip install --group studies") from error
    sample = values[:: max(1, len(values) // SAMPLE)].numpy()
    best = {}

    def cost(log_freedom: float) -> float:
        freedom = 10**log_freedom
        best[log_freedom] = scale = likely_scale(sample, freedom)
        return -float(t.logpdf(sample, freedom, scale=scale).mean())

    found = minimize_scalar(cost, bounds=(0, 3), method="bounded", options={"xatol": 0.01})
    return float(10**found.x), best[found.x]


def likely_scale(sample: Any, freedom: float) -> float:
    """The most likely scale of a centred Student-t: a fixed point of its reweighted variance."""
    squares = sample**2
    variance = squares.mean()
    for _ in range(30):
        weights = (freedom + 1) / (freedom + squares / variance)
        variance = (weights * squares).mean()
    return float(variance**0.5)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All layers of one model."""

    def share(name: str, smaller: bool) -> float:
        pairs = [(abs(row["residual"][name]), abs(row["W"][name])) for row in rows]
        return statistics.fmean(float(a < b if smaller else a > b) for a, b in pairs)

    def median(part: str) -> float:
        return statistics.median(row[part]["student_freedom"] for row in rows)

    return {
        "layers": len(rows),
        "sigma_ratio": statistics.fmean(row["residual"]["sigma"] / row["W"]["sigma"] for row in rows),
        "narrower": share("sigma", True),
        "mean_nearer_zero": share("mean", True),
        "closer_to_gaussian": share("student_freedom", False),
        "less_kurtosis": share("excess_kurtosis", True),
        "freedom": median("W"),
        "freedom_residual": median("residual"),
        "nf4_error_ratio": statistics.fmean(row["nf4_error_residual"] / row["nf4_error"] for row in rows),
    }


def example_layer(source: str) -> tuple[Tensor, int, str]:
    """The paper's example, the first block's query matrix; in other models the first layer."""
    layers = loaded(source)
    name = next((name for name in layers if "q_proj" in name), next(iter(layers)))
    return (*layers[name], name)


def spectrum_of(W: Tensor, rank: int, name: str) -> dict[str, Any]:
    """One matrix in full: singular values of W, W_res and their NF4 errors, and histograms of both."""
    residual = residual_of(W, rank)
    matrices = {"W": W, "W_res": residual, "W − nf4(W)": nf4_error(W), "W_res − nf4(W_res)": nf4_error(residual)}
    curves = {label: torch.linalg.svdvals(matrix)[: min(W.shape)].tolist() for label, matrix in matrices.items()}
    edge = 4 * float(W.std())
    histograms = {
        label: torch.histc(matrix, bins=SHOWN // 2, min=-edge, max=edge).div(matrix.numel()).tolist()
        for label, matrix in list(matrices.items())[:2]
    }
    fits = {"W": values_fit(W), "W_res": values_fit(residual)}
    step = max(1, min(W.shape) // SHOWN)
    curves = {label: values[::step] for label, values in curves.items()}
    shown = {"step": step, "edge": edge, "curves": curves, "histograms": histograms, "fits": fits}
    return {"layer": name, "rank": rank, **shown}


def draw(results: Mapping[str, Any]) -> Any:
    """Singular values and values of the example, and sigma and degrees of freedom of all layers."""
    figure, panels = new_figure(2, 2)
    example = results["example"]
    for (label, values), colour in zip(example["curves"].items(), LIGHT, strict=False):
        panels[0].plot([1 + i * example["step"] for i in range(len(values))], values, label=label, color=colour)
    lowest = min(value for value in example["curves"]["W − nf4(W)"] if value > 0)
    panels[0].set(title=f"singular values of {example['layer']}", xlabel="number", yscale="log")
    panels[0].set_ylim(bottom=lowest / 2)
    edge = example["edge"]
    for (label, counts), colour in zip(example["histograms"].items(), LIGHT, strict=False):
        centres = [edge * (2 * (i + 0.5) / len(counts) - 1) for i in range(len(counts))]
        freedom = example["fits"][label]["student_freedom"]
        text = f"{label}: σ {example['fits'][label]['sigma']:.4f}, t freedom {freedom:.1f}"
        panels[1].plot(centres, counts, label=text, color=colour)
    panels[1].set(title="its values", xlabel="value", ylabel="share")
    panels[1].margins(y=0.2)
    for number, source in enumerate(results["summary"]):
        rows = [row for row in results["layers"] if row["source"] == source]
        dots = {"s": 12, "alpha": 0.6, "color": LIGHT[number], "label": source}
        panels[2].scatter(*pairs(rows, "sigma"), **dots)
        panels[3].scatter(*pairs(rows, "student_freedom"), **dots)
    panels[2].set(title="σ of every layer", xlabel="W", ylabel="W_res")
    panels[3].set(title="Student-t degrees of freedom", xlabel="W", ylabel="W_res", xscale="log", yscale="log")
    for panel in panels[2:]:
        low, high = max(panel.get_xlim()[0], panel.get_ylim()[0]), min(panel.get_xlim()[1], panel.get_ylim()[1])
        panel.plot([low, high], [low, high], color="#888888", linewidth=0.8)
    for panel in panels[:3]:
        panel.legend(frameon=False, fontsize=8)
    return figure


def pairs(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(of W, of W_res) for a scatter."""
    return [row["W"][name] for row in rows], [row["residual"][name] for row in rows]


STUDY = Study(
    NAME,
    "W_res is narrower than W and closer to a Gaussian, and its singular values lack W's large ones "
    "(PiSSA, figures 3, 9, 10, 11)",
    run,
    draw,
    minutes=4,
    intervals_over="layers",
)
