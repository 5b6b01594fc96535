"""Curves of runs, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .style import LIGHT


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
        for run, colour in zip(runs, LIGHT, strict=False):
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


def decorate(panel: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
