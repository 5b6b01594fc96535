"""Curves of runs, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..colours import LIGHT
from ..errors import extra

LONGEST_WINDOW = 5
"""Steps over which the curves of a long run are smoothed."""


def draw_curves(runs: Sequence[Mapping], path: Path, *, title: str) -> None:
    """Loss and gradient norm by step, one line a run, as a PNG.

    Args:
        runs: each with `label`, `losses` and `grad_norms` (one number a step).
        path: the file to write.
        title: above both panels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with extra("report", "figures need matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    window = max(1, min([LONGEST_WINDOW, *(len(run["losses"]) // 6 for run in runs)]))
    panels = figure.subplots(1, 2)
    for panel, key, name in zip(panels, ("losses", "grad_norms"), ("training loss", "gradient norm"), strict=True):
        for run, colour in zip(runs, LIGHT, strict=False):
            values = run[key]
            steps = range(1, len(values) + 1)
            if window > 1:
                panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            panel.plot(steps, running_mean(values, window), label=run["label"], color=colour, linewidth=2.2)
        panel.set(xlabel="step", ylabel=name)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if _spans_decades([value for run in runs for value in run[key]]):
            panel.set(yscale="log", ylabel=f"{name} (log scale)")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, title=f"mean of {window} steps; thin: each step" if window > 1 else None)
    figure.savefig(path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of the ones before it, `window` in all; of fewer at the beginning."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether values need a log scale: on one that spans less, few ticks have a place."""
    return min(values, default=0.0) > 0 and max(values) > 5 * min(values)


def decorate(panel: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
