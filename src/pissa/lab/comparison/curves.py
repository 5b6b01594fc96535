"""What happened while the runs trained: curves over steps, and the steps to a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo.report import LAST, final_loss
from .verdict import finished

POINTS = 24
"""A running mean covers one in so many steps."""


@dataclass(frozen=True)
class Band:
    """A curve over seeds."""

    steps: list[int]
    middle: list[float]
    """Mean over the seeds."""
    low: list[float]
    high: list[float]


def band(runs: Sequence[Mapping[str, Any]], key: str) -> Band | None:
    """A running mean of one number a step, over the finished runs; None where there is none.

    Args:
        runs: of one method.
        key: `losses` or `grad_norms`.
    """
    rows = [run[key] for run in finished(runs) if run.get(key)]
    if not rows:
        return None
    length = min(len(row) for row in rows)
    window = smoothing(length)
    smooth = [running_mean(row[:length], window) for row in rows]
    return _band(list(range(window, length + 1)), list(zip(*smooth, strict=True)))


def smoothing(steps: int) -> int:
    """Over how many steps a curve of this length is averaged."""
    return max(1, steps // POINTS)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of every `window` neighbours."""
    return [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]


def during(runs: Sequence[Mapping[str, Any]], key: str, start: float | None = None) -> Band | None:
    """What was measured on test problems now and then, over the finished runs; None where nothing was.

    Args:
        runs: of one method.
        key: `loss` or `accuracy`.
        start: the base's, drawn at step 0.
    """
    rows = [
        {point["step"]: point[key] for point in run["during"] if point.get(key) is not None}
        for run in finished(runs)
        if run.get("during")
    ]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    if not steps:
        return None
    values = [tuple(row[step] for row in rows) for step in steps]
    return _band([0, *steps], [(start,), *values]) if start is not None else _band(steps, values)


def _band(steps: list[int], values: Sequence[Sequence[float]]) -> Band:
    return Band(steps, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def steps_to_loss(losses: Sequence[float], target: float) -> int | None:
    """The first step at which the mean of the last ten training losses is at or below the target; None for never.

    The mean is that of `final_loss`, so that a run reaches its own final loss at its last step at the latest.
    """
    window = min(LAST, max(len(losses) // 2, 1))
    for end in range(window, len(losses) + 1):
        if math.fsum(losses[end - window : end]) / window <= target + 1e-12:
            return end
    return None


def final_losses(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """The final training loss of each finished run."""
    return [final_loss(run) for run in finished(runs) if run.get("losses")]
