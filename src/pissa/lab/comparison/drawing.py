"""A figure, as a picture for Markdown and as SVG that takes its colours from the page.

A page has light and dark colours as CSS variables; matplotlib knows colours alone. So figures are drawn in the light
ones, and each is replaced in the SVG by its variable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...colours import GRID, INK, LIGHT
from ...errors import extra
from ..style import Look

WIDTH, HEIGHT = 4.7, 3.1
LONGEST = 22
"""Letters of a method's name beside a figure."""
SETTINGS: dict[str, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
}


@dataclass(frozen=True)
class Figure:
    """A drawing, its place on the page and what it shows."""

    name: str
    """The name of its file, without ending."""
    title: str
    caption: str
    draw: Callable[[Any], None]
    """Draws into matplotlib axes."""
    height: float = HEIGHT
    """How high it is, in inches."""
    legend: tuple[str, ...] = ()
    """The methods in it that are told apart by colour."""


def svg(figure: Figure) -> str:
    """The figure as an SVG element with the page's colours and fonts."""
    with io.StringIO() as out:
        _draw(figure, out, "svg", {})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for slot, colour in enumerate(LIGHT):
        text = text.replace(colour, f"var(--m{slot})")
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)").replace("#ffffff", "var(--page)")
    return text.strip()


def png(figure: Figure, looks: Mapping[str, Look]) -> bytes:
    """The figure as a picture on white, with its legend."""
    with io.BytesIO() as out:
        _draw(figure, out, "png", {method: looks[method] for method in figure.legend})
        return out.getvalue()


def _draw(figure: Figure, out: Any, kind: str, legend: Mapping[str, Look]) -> None:
    with extra("report", "a report needs matplotlib and jinja2"):
        import matplotlib
        from matplotlib.figure import Figure as Canvas
        from matplotlib.lines import Line2D
    settings: Any = {**SETTINGS, "svg.hashsalt": figure.name}
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(WIDTH, figure.height), dpi=160, layout="constrained")
        axes = canvas.subplots()
        axes.grid(which="major")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.draw(axes)
        if legend:
            lines = [Line2D([], [], color=k.colour, linestyle=k.dashes, linewidth=2) for k in legend.values()]
            canvas.legend(lines, [short(name) for name in legend], loc="outside upper left", ncols=3, frameon=False)
        canvas.patch.set_alpha(0 if kind == "svg" else 1)
        canvas.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)


def short(name: str) -> str:
    """A name that fits beside a figure."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def log_axis(axes: Any, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks at round numbers however short it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    subs = (
        (1.0,)
        if high > 300 * low
        else (1.0, 2.0, 5.0)
        if high > 4 * low
        else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    )
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value) if which == "x" else f"{value:g}"))


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e−").replace("e+0", "e")
