"""Figures of an inspection: reduction against rank, and the singular values of what is quantised and what is lost.

The curves against rank (paper, figures 7a and 14) are of the given ranks; where only one is given, of one block at its
halves. The singular values (figures 3 and 10) are of W, W_res and the errors of quantising either, in one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..checkpoint.write import explained
from ..config import PissaConfig
from ..errors import MissingExtraError
from ..live.targets import Target
from ..quantize.error import split_error
from ..quantize.formats import quantize_matrix
from ..split import split_weight
from .figures import COLOURS, decorate
from .inspect import inspect_quantized
from .inspect_layers import kind_of, matrices_of, select_targets
from .variants import Variant

HALVINGS = 4
"""Ranks in a curve where one is given."""


def draw_inspection(
    model: nn.Module,
    variants: Sequence[Variant],
    ranks: Sequence[int],
    rows: Sequence[dict[str, Any]],
    directory: Path,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw both figures, as PNG.

    Args:
        model, variants, ranks, target_modules, max_layers, progress: as in `inspect_quantized`.
        rows: what it found; taken as the curves where it measured several ranks.
        directory: made where it does not exist.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the directory cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'pissa[report]'") from error
    if len(ranks) == 1:
        halves = sorted({max(1, ranks[0] >> shift) for shift in range(HALVINGS)})
        unaware = [variant for variant in variants if not variant.aware]
        rows = inspect_quantized(
            model, unaware, halves, target_modules=target_modules, norms=["nuclear"], max_layers=1, progress=progress
        )["rows"]
    chosen = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    targets = select_targets(model, PissaConfig(rank=max(ranks), target_modules=chosen), 1)
    paths = [directory / "reduction.png", directory / "singular_values.png"]
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        draw_reduction(rows, paths[0])
        draw_spectra(targets, variants[-1], max(ranks), paths[1])
    return paths


def draw_plan(document: dict[str, Any], directory: Path) -> Path:
    """Ranks by layer and kind, and what a budget captures, planned and uniform, as PNG.

    Args:
        document: what `inspect_budget` found.
        directory: made where it does not exist.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the directory cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'pissa[report]'") from error
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    ranks, curve = figure.subplots(1, 2)
    kinds: dict[str, list[int]] = {}
    for layer in document["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer["rank"])
    for number, (kind, values) in enumerate(kinds.items()):
        style = "-" if number < len(COLOURS) else "--"
        ranks.plot(range(len(values)), values, style, label=kind, color=COLOURS[number % len(COLOURS)])
    ranks.set(xlabel="layer", ylabel="rank", yscale="log")
    ranks.yaxis.set_major_formatter("{x:.0f}")
    parts = [point["budget"] / 1e6 for point in document["curve"]]
    for key, label, colour in (("captured", "planned", COLOURS[0]), ("uniform_captured", "uniform", COLOURS[1])):
        curve.plot(parts, [point[key] for point in document["curve"]], label=label, color=colour)
    curve.set(xlabel="million parameters", ylabel="captured (%)")
    decorate(ranks)
    decorate(curve)
    curve.legend(frameon=False)
    ranks.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    path = directory / "ranks.png"
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def draw_reduction(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean reduction against rank, a line for each method."""
    from matplotlib.figure import Figure

    norm = rows[0]["norm"]
    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((row["rank"], row["mean"]) for row in rows if (row["method"], row["norm"]) == (method, norm))
        style = "-" if number < len(COLOURS) else "--"
        panel.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[number % len(COLOURS)], label=method)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="rank", ylabel=f"error reduction, {norm} norm (%)")
    panel.xaxis.set_major_formatter("{x:.0f}")
    decorate(panel)
    panel.legend(frameon=False)
    figure.savefig(path)


def draw_spectra(targets: Sequence[Target], variant: Variant, rank: int, path: Path) -> None:
    """Singular values of W, W_res and their quantisation errors, a panel for each kind of layer."""
    from matplotlib.figure import Figure

    columns = min(4, len(targets))
    lines = math.ceil(len(targets) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, target in zip(panels, targets, strict=False):
        for (label, values), colour in zip(spectra(target, variant, rank).items(), COLOURS, strict=False):
            panel.plot(range(1, len(values) + 1), values.tolist(), label=label, color=colour, linewidth=1.2)
        panel.set(title=kind_of(target.name), yscale="log")
        decorate(panel)
    for panel in panels[len(targets) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def spectra(target: Target, variant: Variant, rank: int) -> dict[str, Tensor]:
    """Name -> singular values, descending; of a stack of experts, the first one's."""
    name, W = matrices_of(target)[0]
    W = W.float()
    residual = split_weight(W, PissaConfig(rank=rank), name=name).residual
    config = variant.plain
    kind = config.format.upper()
    matrices = {
        "W": W,
        "W_res": residual,
        f"W − {kind}(W)": W - quantize_matrix(W, config, W.dtype).dequantize(),
        f"W_res − {kind}(W_res)": residual - quantize_matrix(residual, config, W.dtype).dequantize(),
    }
    if not variant.aware:
        matrices[f"error of {variant.name}"] = split_error(W, split_weight(W, variant.config(rank, 0), name=name))
    return {label: positive(torch.linalg.svdvals(matrix)) for label, matrix in matrices.items()}


def positive(values: Tensor) -> Tensor:
    """What a logarithmic axis can show: not the zeros at the end of a low-rank or split matrix."""
    return values[values > 1e-6 * values[0]] if values[0] > 0 else values[:0]
