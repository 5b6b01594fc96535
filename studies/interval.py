"""A mean over seeds and how far it can be trusted: Student's t interval.

    mean ± t(1 − (1 − c)/2, n − 1) · s / √n        s the sample's standard deviation, c the confidence

Two methods that share their seeds are compared by the interval of their differences, seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pissa.errors import ConfigError
from pissa.lab.comparison.statistics import t_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float | None
    """None where there is one value only, which says nothing of the spread."""
    high: float | None
    values: tuple[float, ...]
    """One for each seed."""

    def __str__(self) -> str:
        """The interval in a line of text: `0.945 ± 0.012`, or the mean alone."""
        if self.high is None:
            return f"{self.mean:.4g}"
        half = self.high - self.mean
        digits = 3 if half <= 0 or not math.isfinite(half) else max(0, 1 - math.floor(math.log10(half)))
        return f"{self.mean:.{digits}f} ± {half:.{digits}f}"

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high is not None and self.high < 0

    def as_dict(self) -> dict[str, object]:
        """The interval in JSON's own kinds."""
        return {**asdict(self), "values": list(self.values)}


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of some independent measurements with its t interval.

    Args:
        values: one for each seed, finite.
        confidence: in (0, 1).

    Raises:
        ConfigError: no values.
    """
    if not values:
        raise ConfigError("no values to average; give one for each seed")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None, tuple(values))
    half = t_quantile(1 - confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, tuple(values))


def paired_difference(left: Sequence[float], right: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval of `left − right`, measured with the same seeds in the same order.

    Raises:
        ConfigError: unequal numbers of values, or none.
    """
    if len(left) != len(right):
        raise ConfigError(f"{len(left)} values against {len(right)}; give one of each for each seed")
    return mean_interval([a - b for a, b in zip(left, right, strict=True)], confidence)
