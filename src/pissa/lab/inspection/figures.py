"""Figures of an inspection: reduction against rank, and the singular values of what is quantised and what is lost.

The curves against rank (paper, figures 7a and 14) are of the given ranks; where only one is given, of one block at its
halves. The singular values (figures 3 and 10) are of W, W_res and the errors of quantising either, in one block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.disk.write import explained
from ...colours import LIGHT
from ...errors import extra
from ..figures import decorate


def draw_inspection(
    rows: Sequence[dict[str, Any]], spectra: Mapping[str, Mapping[str, Tensor]], directory: Path
) -> list[Path]:
    """Draw what an inspection measured, as PNG.

    Args:
        rows: of `inspect_quantized`, at several ranks.
        spectra: kind of layer -> name of the matrix -> its singular values (n,), descending.
        directory: made where it does not exist.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the directory cannot be written.
    """
    with extra("report", "figures need matplotlib"):
        import matplotlib  # noqa: F401
    paths = [directory / "reduction.png", directory / "singular_values.png"]
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        draw_reduction(rows, paths[0])
        draw_spectra(spectra, paths[1])
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
    with extra("report", "figures need matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    ranks, curve = figure.subplots(1, 2)
    kinds: dict[str, list[int]] = {}
    for layer in document["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer["rank"])
    for number, (kind, values) in enumerate(kinds.items()):
        style = "-" if number < len(LIGHT) else "--"
        ranks.plot(range(len(values)), values, style, label=kind, color=LIGHT[number % len(LIGHT)])
    ranks.set(xlabel="layer", ylabel="rank", yscale="log")
    ranks.yaxis.set_major_formatter("{x:.0f}")
    parts = [point["budget"] / 1e6 for point in document["curve"]]
    for key, label, colour in (("captured", "planned", LIGHT[0]), ("uniform_captured", "uniform", LIGHT[1])):
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
        style = "-" if number < len(LIGHT) else "--"
        panel.plot(*zip(*points, strict=True), style, marker="o", color=LIGHT[number % len(LIGHT)], label=method)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="rank", ylabel=f"error reduction, {norm} norm (%)")
    panel.xaxis.set_major_formatter("{x:.0f}")
    decorate(panel)
    panel.legend(frameon=False)
    figure.savefig(path)


def draw_spectra(spectra: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Singular values of W, W_res and their quantisation errors, a panel for each kind of layer."""
    from matplotlib.figure import Figure

    columns = min(4, len(spectra))
    lines = math.ceil(len(spectra) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (kind, named) in zip(panels, spectra.items(), strict=False):
        for (label, values), colour in zip(named.items(), LIGHT, strict=False):
            panel.plot(range(1, len(values) + 1), values.tolist(), label=label, color=colour, linewidth=1.2)
        panel.set(title=kind, yscale="log")
        decorate(panel)
    for panel in panels[len(spectra) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
