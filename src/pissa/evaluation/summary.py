"""An evaluation's results in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARES = ("exact_match", "pass@1", "accuracy")


def results_text(results: Mapping[str, Any], out: object = None) -> str:
    """A few lines for people: the figure with its interval, what else there is, and where the samples are."""
    metric, value, count = results["metric"], results["value"], results["count"]
    line = f"{results['task']}: {metric} {_figure(metric, value)}"
    if metric in SHARES:
        line += f", {round(value * count)} of {count}"
    else:
        line += f" over {count} samples"
    if results["interval"] is not None:
        low, high = results["interval"]
        line += f" (95 % interval {_figure(metric, low)} to {_figure(metric, high)})"
    lines = [line]
    lines += [f"{name} {_figure(name, figure)}" for name, figure in results["others"].items()]
    lines += [f"note: {note}" for note in results["notes"]]
    if out is not None:
        lines.append(f"{out} holds results.json and every sample in samples.jsonl")
    return "\n".join(lines)


def _figure(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric in SHARES or metric.startswith("pass@") else f"{value:.4g}"
