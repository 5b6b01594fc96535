"""What the figures of the studies have in common; each method looks as in the reports of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pissa.errors import MissingExtraError
from pissa.lab import style
from pissa.lab.figures import decorate
from pissa.lab.style import CIRCLE, DASHED, DIAMOND, DOTTED, DOWN, SOLID, Look

OWN = {
    "lora, its own rate": Look(5, DASHED, CIRCLE),
    "cura-optimal": Look(4, DOTTED, DOWN),
    "ours-5": Look(2, SOLID, DIAMOND),
}
"""What only studies compare."""


def look_of(method: str, number: int | None = None) -> Look:
    """As `pissa.lab.style.look_of`, also of what only studies compare."""
    return OWN.get(method) or style.look_of(method, number)


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


def band(panel: Any, x: Sequence[float], curves: Sequence[Sequence[float]], *, label: str, look: Look) -> None:
    """The mean of some curves (one a seed) over x, with the range they span."""
    columns = list(zip(*curves, strict=True))
    panel.plot(x, [sum(column) / len(column) for column in columns], label=label, linewidth=1.6, **look.line)
    if len(curves) > 1:
        lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
        panel.fill_between(x, lowest, highest, color=look.colour, alpha=0.18, lw=0)


def seed_dots(panel: Any, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A large dot for each method's mean, from above, and a small one for each of its values.

    Args:
        panel: to draw in.
        table: method -> `mean` and `values`.
        title: above the panel.
    """
    for place, (method, entry) in enumerate(table.items()):
        panel.plot(entry["mean"], place, "o", markersize=11, alpha=0.7, color=look_of(method, place).colour)
        panel.plot(entry["values"], [place] * len(entry["values"]), "k.", markersize=4)
    panel.set_yticks(range(len(table)), list(table))
    panel.set_ylim(len(table) - 0.5, -0.5)
    panel.set_title(title)


def search_lines(panel: Any, search: Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """What a search for learning rates saw: the loss on the validation rows against the rate, a line a method.

    Args:
        panel: to draw in.
        search: `Search.as_dict()`; nothing is drawn where nothing was tried.
        styles: method -> matplotlib's settings of its line, in place of the method's own.
    """
    for number, (method, values) in enumerate(search["values"].items()):
        tried = {float(rate): value for rate, value in values.items() if value is not None}
        style = {**look_of(method, number).line, **(styles or {}).get(method, {})}
        panel.plot(list(tried), list(tried.values()), label=method, marker="o", markersize=3, **style)
    panel.set(title="search, on validation rows", xlabel="learning rate")
    if any(search["values"].values()):
        panel.set(xscale="log", yscale="log")
        rates = sorted({float(rate) for values in search["values"].values() for rate in values})
        panel.set_xticks(rates, [f"{rate:.1g}" for rate in rates], rotation=40, fontsize=8)
        panel.set_xticks([], minor=True)
    panel.legend(frameon=False, fontsize=8)
