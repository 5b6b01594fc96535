"""A run's curves as one picture: loss with the validation loss, gradient norm and learning rate, by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..colours import FAINT, LIGHT

NAME = "curves.png"
POINTS = 24
"""The running mean covers one in so many steps."""
NAMES = {"loss": "loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
SINGLE, MEAN, VALIDATION = FAINT, *LIGHT[:2]


def draw_curves(log: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], out: Path) -> bool:
    """Write the picture.

    Args:
        log: of each step "step", "loss", "grad_norm" and "learning_rate".
        validation: of each measurement "step" and "loss".
        out: the file.

    Returns:
        Whether it is there: without matplotlib there is none.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.2, 5.6), dpi=110)
    edges = {"left": 0.13, "right": 0.97, "top": 0.94, "bottom": 0.09}
    grid = figure.add_gridspec(3, 1, height_ratios=(3, 1.4, 1.3), hspace=0.12, **edges)
    top = figure.add_subplot(grid[0])
    axes = [top, *(figure.add_subplot(grid[place], sharex=top) for place in (1, 2))]
    steps = [record["step"] for record in log]
    window = max(len(log) // POINTS, 1)
    for axis, key in zip(axes, NAMES, strict=True):
        values = [math.nan if record.get(key) is None else record[key] for record in log]
        if window > 1 and key != "learning_rate":
            means = [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
            axis.plot(steps, values, color=SINGLE, linewidth=0.9, label="each step")
            axis.plot(steps[window - 1 :], means, color=MEAN, label=f"mean of {window}")
        else:
            axis.plot(steps, values, color=MEAN, marker="o" if len(log) == 1 else None, label="training")
        axis.set_ylabel(NAMES[key])
        axis.grid(alpha=0.3)
    if validation:
        points = [record["step"] for record in validation], [record["loss"] for record in validation]
        top.plot(*points, color=VALIDATION, marker="o", markersize=3.5, linewidth=1.2, label="validation")
    if validation or window > 1:
        top.legend(frameon=False, fontsize=9)
    top.set_title("Training", loc="left", fontsize=10.5)
    for axis in axes[:2]:
        axis.tick_params(labelbottom=False)
    axes[2].set_xlabel("step")
    axes[2].yaxis.set_major_formatter(lambda rate, _place: f"{rate:.1e}" if rate else "0")
    axes[2].locator_params(axis="x", integer=True)
    figure.align_ylabels(axes)
    FigureCanvasAgg(figure).print_png(str(out))
    return True
