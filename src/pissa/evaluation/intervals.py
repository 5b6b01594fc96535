"""How sure a figure is: 95 % intervals over the problems that it was measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np

Z = 1.96
RESAMPLES = 2000


def wilson(successes: float, count: float, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share (JASA 22, 1927): 95 % for the usual z.

    Neither number need be whole: a share whose errors are correlated counts as fewer independent trials.
    """
    p = successes / count
    centre, half = p + z * z / (2 * count), z * sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)
    return max(low, 0.0), min(high, 1.0)


def bootstrap(
    rows: Sequence[Any], statistic: Callable[[list[Any]], float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a statistic over resampled rows.

    Args:
        rows: one per problem.
        statistic: of a list of rows; a resample for which it is not finite is left out.
        seed: of the resamples.
        resamples: how many.

    Returns:
        The interval; None for fewer than two rows, or where over half of the resamples have no finite value.
    """
    if len(rows) < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [statistic([rows[i] for i in generator.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    finite = [value for value in values if np.isfinite(value)]
    if 2 * len(finite) < resamples:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
