"""Figures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

COLOURS = ("#d1495b", "#2e86ab", "#66a182", "#8d6a9f", "#e8a33d", "#4a4e69")
METHOD_COLOURS = {
    "pissa": COLOURS[0],
    "lora": COLOURS[1],
    "full": COLOURS[2],
    "random-pissa": COLOURS[3],
    "dora": COLOURS[4],
    "base": COLOURS[5],
    "qpissa": "#f28482",
    "qlora": "#84bcda",
    "loftq": "#8d6a9f",
    "ours": "#e8a33d",
    "robust-pissa": "#b56576",
    "cura": "#5f9ea0",
    "cura-optimal": "#2f4f4f",
    "adalora": "#a3b18a",
    "pissa+dora": "#bc4b51",
    "pissa+adalora": "#e07a5f",
    "lora-gaussian": "#1b4965",
    "lora-kaiming": COLOURS[1],
}
"""A method has one colour in all figures."""


def draw_curves(runs: Sequence[Mapping], path: Path, *, title: str) -> None:
    """Loss and gradient norm by step, one line a run, as a PNG.

    Args:
        runs: each with `label`, `losses` and `grad_norms` (one number a step).
        path: the file to write.
        title: above both panels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'pissa[report]'") from error
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for panel, key, name in zip(panels, ("losses", "grad_norms"), ("training loss", "gradient norm"), strict=True):
        for run, colour in zip(runs, COLOURS, strict=False):
            values = run[key]
            panel.plot(range(1, len(values) + 1), values, label=run["label"], color=colour, linewidth=1.6)
        panel.set(xlabel="step", ylabel=name, yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path)


def colour_of(method: str, number: int = 0) -> str:
    """A method's own colour; with iterations (`qpissa-5`) or behind a format (`nf4 lora`) its family's, else the
    number's."""
    name = method.rpartition(" ")[2]
    family = name.rpartition("-")[0] if name.rpartition("-")[2].isdigit() else name
    return METHOD_COLOURS.get(family, COLOURS[number % len(COLOURS)])


def new_figure(lines: int = 1, columns: int = 1, *, width: float = 5.0, height: float = 4.2) -> tuple[Any, list[Any]]:
    """An empty figure in the house style.

    Args:
        lines, columns: of panels.
        width, height: of a panel, in inches.

    Returns:
        The matplotlib Figure and its panels, line by line.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'pissa[report]'") from error
    figure = Figure(figsize=(width * columns, height * lines), dpi=130, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for panel in panels:
        decorate(panel)
    return figure, panels


def decorate(panel: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)


def band(panel: Any, x: Sequence[float], curves: Sequence[Sequence[float]], *, label: str, colour: str) -> None:
    """The mean of some curves (one a seed) over x, with the range they span."""
    columns = list(zip(*curves, strict=True))
    panel.plot(x, [sum(column) / len(column) for column in columns], label=label, color=colour, linewidth=1.6)
    if len(curves) > 1:
        panel.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18, lw=0)


def seed_dots(panel: Any, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A large dot for each method's mean, from above, and a small one for each of its values.

    Args:
        panel: to draw in.
        table: method -> `mean` and `values`.
        title: above the panel.
    """
    for place, (method, entry) in enumerate(table.items()):
        panel.plot(entry["mean"], place, "o", markersize=11, alpha=0.7, color=colour_of(method, place))
        panel.plot(entry["values"], [place] * len(entry["values"]), "k.", markersize=4)
    panel.set_yticks(range(len(table)), list(table))
    panel.set_ylim(len(table) - 0.5, -0.5)
    panel.set_title(title)


def search_lines(panel: Any, search: Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """What a search for learning rates saw: the loss on the validation rows against the rate, a line a method.

    Args:
        panel: to draw in.
        search: `Search.as_dict()`; nothing is drawn where nothing was tried.
        styles: method -> matplotlib's settings of its line, beside the method's colour.
    """
    for number, (method, values) in enumerate(search["values"].items()):
        tried = {float(rate): value for rate, value in values.items() if value is not None}
        style = {"color": colour_of(method, number), **(styles or {}).get(method, {})}
        panel.plot(list(tried), list(tried.values()), label=method, marker="o", markersize=3, **style)
    panel.set(title="search, on validation rows", xlabel="learning rate")
    if any(search["values"].values()):
        panel.set(xscale="log", yscale="log")
        rates = sorted({float(rate) for values in search["values"].values() for rate in values})
        panel.set_xticks(rates, [f"{rate:.1g}" for rate in rates], rotation=40, fontsize=8)
        panel.set_xticks([], minor=True)
    panel.legend(frameon=False, fontsize=8)
