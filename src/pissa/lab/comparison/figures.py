"""The figures of a comparison: curves, learning rates, differences and the null arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...colours import GRID, INK, LIGHT
from ..style import Look
from .curves import Band, band, during
from .drawing import Figure, log_axis, short
from .null_arm import NullRate
from .verdict import Comparison, Metric

Draw = Callable[[Any], None]


def curve_figures(results: Mapping[str, Any], looks: Mapping[str, Look], window: int) -> list[Figure]:
    """Loss and gradient norm by step, and what was measured on test problems meanwhile; those of which there is any."""
    methods = results["methods"]
    base = results.get("base") or {}
    smoothed = f"running mean of {window} steps, " if window > 1 else ""
    bands = "line: mean over seeds; band: from the lowest to the highest seed"
    correct = base.get("test_correct")
    start = sum(correct) / len(correct) if correct else None
    kinds = (
        ("loss", "Training loss", "nats per token", True, lambda runs: band(runs, "losses"), smoothed + bands),
        ("gradient-norm", "Gradient norm", "norm", True, lambda runs: band(runs, "grad_norms"), smoothed + bands),
        ("test-loss", "Test loss during training", "nats per token", False,
         lambda runs: during(runs, "loss", base.get("curve_loss")), f"as in the table, of the first problems; {bands}"),
        ("accuracy", "Accuracy during training", "share solved", False,
         lambda runs: during(runs, "accuracy", start), f"on test problems; {bands}"),
    )  # fmt: skip
    figures = []
    for name, title, unit, log, measured, caption in kinds:
        found = {method: curve for method, m in methods.items() if (curve := measured(m["runs"])) is not None}
        if found:
            figures.append(Figure(name, title, caption, _curves(found, looks, unit, log), legend=tuple(found)))
    return figures


def _curves(found: Mapping[str, Band], looks: Mapping[str, Look], unit: str, log: bool) -> Draw:
    def draw(axes: Any) -> None:
        for method, curve in found.items():
            look = looks[method]
            axes.fill_between(curve.steps, curve.low, curve.high, color=look.colour, alpha=0.16, linewidth=0)
            marker = look.marker if len(curve.steps) < 12 else None
            axes.plot(
                curve.steps,
                curve.middle,
                color=look.colour,
                linestyle=look.dashes,
                linewidth=1.8,
                marker=marker,
                markersize=5,
            )
        axes.set(xlabel="step", ylabel=unit)
        axes.locator_params(axis="x", integer=True)
        if log:
            log_axis(axes, "y")

    return draw


def rate_figure(results: Mapping[str, Any], looks: Mapping[str, Look]) -> Figure | None:
    """Validation loss against learning rate, rung by rung; None where no rate was searched."""
    methods = {name: method for name, method in results["methods"].items() if method["trials"]}
    if not methods:
        return None
    caption = (
        "a line per method and rung of the search, the last one bold; a ring marks the chosen rate, a cross at the "
        "top a rate that diverged or whose loss is far above"
    )
    return Figure("learning-rates", "Learning rates tried", caption, _rates(methods, looks), legend=tuple(methods))


def _rates(methods: Mapping[str, Any], looks: Mapping[str, Look]) -> Draw:
    top, ceiling = _highest_loss([trial for method in methods.values() for trial in method["trials"]])

    def draw(axes: Any) -> None:
        for name, method in methods.items():
            last = max(trial["rung"] or 0 for trial in method["trials"])
            for rung in range(last + 1):
                trials = [trial for trial in method["trials"] if (trial["rung"] or 0) == rung]
                chosen = method["learning_rate"] if rung == last else None
                _draw_rung(axes, trials, looks[name], chosen, top, ceiling, bold=rung == last)
        axes.set(xlabel="learning rate", ylabel="validation loss (nats per token)")
        log_axis(axes, "x")

    return draw


def _highest_loss(trials: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The highest loss that is drawn in its place, and where all above it are drawn."""
    losses = sorted(trial["validation_loss"] for trial in trials if _known(trial))
    if not losses:
        return 1.0, 1.0
    least, middle = losses[0], losses[len(losses) // 2]
    top = min(losses[-1], least + 4 * max(middle - least, 0.01 * abs(least), 1e-6))
    return top, top + 0.08 * ((top - least) or 1.0)


def _draw_rung(
    axes: Any,
    trials: Sequence[Mapping[str, Any]],
    look: Look,
    chosen: float | None,
    top: float,
    ceiling: float,
    *,
    bold: bool,
) -> None:
    shown = sorted(
        (trial["learning_rate"], trial["validation_loss"])
        for trial in trials
        if _known(trial) and trial["validation_loss"] <= top
    )
    inside = {rate for rate, _ in shown}
    beyond = [trial["learning_rate"] for trial in trials if trial["learning_rate"] not in inside]
    weight = {"linewidth": 2.0 if bold else 1.1, "alpha": 1.0 if bold else 0.6}
    axes.plot(*_columns(shown), color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4.5, **weight)
    axes.plot(beyond, [ceiling] * len(beyond), "x", color=look.colour, markersize=7, markeredgewidth=1.8)
    ring = {"markersize": 13, "fillstyle": "none", "markeredgewidth": 1.8}
    axes.plot(*_columns([point for point in shown if point[0] == chosen]), "o", color=look.colour, **ring)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _known(trial: Mapping[str, Any]) -> bool:
    loss = trial.get("validation_loss")
    return trial["status"] == "done" and loss is not None and math.isfinite(loss)


def difference_figures(
    comparisons: Sequence[Comparison], looks: Mapping[str, Look], null: NullRate | None
) -> list[Figure]:
    """Each method's difference with its interval, a figure per metric and per method that it is compared with."""
    figures = []
    rights = list(dict.fromkeys(c.right for c in comparisons))
    for right, metric in dict.fromkeys((right, c.metric) for right in rights for c in comparisons if c.right == right):
        shown = [c for c in comparisons if (c.metric, c.right) == (metric, right)]
        spread = null.spread(metric.name) if null and right == null.method and metric.name in null.differences else None
        side = f"{'right' if metric.higher_is_better else 'left'} of 0 is better than {right}"
        shade = "; shaded: where 95 % of the null arm’s differences lie" if spread else ""
        figures.append(
            Figure(
                f"difference-{metric.name.replace(' ', '-')}"
                + (f"-{rights.index(right) + 1}" if right != rights[0] else ""),
                f"{metric.name.capitalize()} minus that of {right}",
                f"{side}; the bar is the interval that the verdict rests on{shade}",
                _differences(shown, metric, looks, spread),
                height=1.1 + 0.38 * len(shown),
            )
        )
    return figures


def _differences(shown: Sequence[Comparison], metric: Metric, looks: Mapping[str, Look], spread: float | None) -> Draw:
    scale = 100 if metric.unit == "points" else 1

    def draw(axes: Any) -> None:
        if spread is not None:
            axes.axvspan(-scale * spread, scale * spread, color=GRID, alpha=0.6, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        for place, comparison in enumerate(shown):
            look, (low, high) = looks[comparison.left], comparison.interval
            axes.plot(
                [scale * low, scale * high], [place, place], color=look.colour, linewidth=2.6, solid_capstyle="butt"
            )
            axes.plot(scale * comparison.estimate.value, place, look.marker, color=look.colour, markersize=8)
        axes.locator_params(axis="x", nbins=6)
        axes.set_yticks(range(len(shown)), [short(comparison.left) for comparison in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("percentage points" if scale == 100 else metric.unit)

    return draw


def null_figures(null: NullRate, comparisons: Sequence[Comparison], looks: Mapping[str, Look]) -> list[Figure]:
    """How large differences of nothing are, with the methods' own differences beside them; a figure per metric."""
    figures = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        shown = [c for c in comparisons if c.metric == metric and c.right == null.method]
        if metric.name in null.differences and shown:
            figures.append(
                Figure(
                    f"null-{metric.name.replace(' ', '-')}",
                    f"{metric.name.capitalize()}: differences of nothing",
                    f"grey: {null.method} against itself; lines: each method’s difference from {null.method}",
                    _null(null.differences[metric.name], shown, looks),
                    legend=tuple(c.left for c in shown),
                )
            )
    return figures


def _null(differences: Sequence[float], shown: Sequence[Comparison], looks: Mapping[str, Look]) -> Draw:
    percent = shown[0].metric.unit == "points"
    scale = 100 if percent else 1

    def draw(axes: Any) -> None:
        axes.hist([scale * d for d in differences], bins=31, color=LIGHT[-1], alpha=0.45)
        for comparison in shown:
            look = looks[comparison.left]
            axes.axvline(scale * comparison.estimate.value, color=look.colour, linestyle=look.dashes, linewidth=2.2)
        axes.grid(axis="x", visible=False)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel="percentage points" if percent else shown[0].metric.unit, ylabel="resamples")

    return draw


def all_figures(
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    null: NullRate | None,
    looks: Mapping[str, Look],
    window: int,
) -> dict[str, list[Figure]]:
    """Section -> its figures; differences of too few seeds are not drawn."""
    comparisons = [comparison for comparison in comparisons if comparison.enough]
    rates = rate_figure(results, looks)
    return {
        "differences": difference_figures(comparisons, looks, null),
        "curves": curve_figures(results, looks, window),
        "rates": [rates] if rates else [],
        "null": null_figures(null, comparisons, looks) if null else [],
    }
