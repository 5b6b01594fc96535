"""LoRA against itself: how often the verdict would call a difference where there is none, on the data at hand.

All runs of one method at one learning rate, from the comparison and from its null arm, differ in nothing but the seed.
Split at random into two groups, on problems drawn with replacement, they are two methods that are the same. The share
of such splits in which the tool calls a difference is its false positive rate, on these problems and with this noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...evaluation.intervals import wilson
from .statistics import Estimate, difference_moments, holm
from .verdict import ERROR, FEWEST_SEEDS, METRICS, Metric, cautious, finished, outcomes

RESAMPLES = 1000


@dataclass(frozen=True)
class NullRate:
    """What the null arm showed."""

    method: str
    resamples: int
    called: int
    """Resamples in which any metric was called different."""
    seeds: tuple[int, int]
    """Size of the two groups."""
    differences: dict[str, list[float]]
    """Metric -> difference of the groups, resample by resample."""

    @property
    def share(self) -> float:
        """The false positive rate."""
        return self.called / self.resamples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share. It counts resamples alone: the seeds are the same throughout."""
        return wilson(self.called, self.resamples)

    @property
    def groupings(self) -> int:
        """How many ways there are to split the seeds."""
        left, right = self.seeds
        return math.comb(left + right, left) // (2 if left == right else 1)

    def spread(self, metric: str) -> float:
        """The size that differences of nothing stay below in 95 % of the resamples."""
        return float(np.quantile(np.abs(self.differences[metric]), 0.95))


def null_rate(results: Mapping[str, Any], *, resamples: int = RESAMPLES, seed: int = 0) -> NullRate | None:
    """Call differences between groups of runs that have none.

    Args:
        results: what `pissa compare` wrote in results.json.
        resamples: random regroupings of the seeds, each on problems drawn anew.
        seed: of the draws.

    Returns:
        None where there is no null arm, where nothing was measured problem by problem, or where it or its method has
        fewer than three finished runs.
    """
    null = results.get("null")
    if not null or null["method"] not in results["methods"]:
        return None
    own = finished(results["methods"][null["method"]]["runs"])
    others = finished(null["runs"])
    if min(len(own), len(others)) < FEWEST_SEEDS:
        return None
    runs = [*own, *others]
    measured = {metric: np.asarray(rows, np.float64) for metric in METRICS if (rows := outcomes(runs, metric))}
    if not measured:
        return None
    rng = np.random.default_rng(seed)
    called, differences = 0, {metric.name: [] for metric in measured}
    for _ in range(resamples):
        found = _regrouped(measured, len(own), rng)
        called += min(holm([cautious(estimate.p_value) for estimate in found.values()])) <= ERROR
        for metric, estimate in found.items():
            differences[metric.name].append(estimate.value)
    return NullRate(null["method"], resamples, called, (len(own), len(others)), differences)


def _regrouped(measured: Mapping[Metric, np.ndarray], size: int, rng: np.random.Generator) -> dict[Metric, Estimate]:
    order = rng.permutation(len(next(iter(measured.values()))))
    draws = rng.random(max(outcome.shape[1] for outcome in measured.values()))
    found = {}
    for metric, outcome in measured.items():
        problems = outcome.shape[1]
        sample = outcome[order][:, (draws[:problems] * problems).astype(int)]
        value, variance, freedom = difference_moments(sample[:size], sample[size:])
        found[metric] = Estimate(float(value), math.sqrt(variance), float(freedom), problems)
    return found
