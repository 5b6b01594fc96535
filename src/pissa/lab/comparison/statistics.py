"""Differences of two methods, with both sources of noise: the seeds they were trained with and the problems tested on.

Each method gives a matrix of outcomes (right or wrong, or a loss), one row a seed, one column a problem; the problems
are the same for both methods, the seeds are not paired. A method's mean over seeds and problems is
    mean + seed + method × problem + seed × problem,
and its difference from another's varies with three variances, estimated as in a two-way analysis of variance:
    V_seeds     variance of a method's seed means, over the number of seeds; summed over both methods
    V_problems  variance over problems of the difference of the methods' problem means, over the number of problems
    V_rest      what is left of a matrix without its row and column means, over its size; summed over both methods
V_seeds and V_problems both contain V_rest once, so that the difference's variance is V_seeds + V_problems − V_rest, at
least V_rest. Its degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946), small for three seeds: then
Student's t asks for more than 1.96 standard errors. V_seeds counts with at most twice the degrees of freedom of the
method with fewer seeds, without which three seeds against five are called different too often. A variance of problems
alone, as a bootstrap over problems or a McNemar test has it, would call a lucky seed a better method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError, extra
from ...evaluation.intervals import wilson

POWER = 0.8
"""A smallest detectable difference is found in this share of comparisons."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and how sure it is."""

    value: float
    standard_error: float
    """It counts seeds and problems together; problems alone where a method has a single seed."""
    freedom: float
    """Degrees of freedom of the standard error."""
    problems: int

    @property
    def p_value(self) -> float:
        """Two-sided, of the value being 0.

        Never below 2^(1 − problems), which is what the signs of the problems could show at the utmost: two methods
        that differ on each of three problems have a standard error of 0.
        """
        if self.value == 0:
            return 1.0
        if self.standard_error == 0:
            return 2.0 ** (1 - self.problems)
        tail = 2 * float(_scipy_stats().t.sf(abs(self.value) / self.standard_error, self.freedom))
        return max(tail, 2.0 ** (1 - self.problems))

    def interval(self, error: float = 0.05) -> tuple[float, float]:
        """Bounds that miss the truth with this probability."""
        half = self.half_width(error)
        return self.value - half, self.value + half

    def half_width(self, error: float) -> float:
        """The smallest value that would be called different from 0 at this error."""
        return t_quantile(error, self.freedom) * self.standard_error if self.standard_error else 0.0

    def smallest_detectable(self, error: float) -> float:
        """The true difference that would be called, at this error, in four of five comparisons like this one."""
        if not self.standard_error:
            return 0.0
        return self.half_width(error) + t_quantile(2 * (1 - POWER), self.freedom) * self.standard_error


def t_quantile(error: float, freedom: float) -> float:
    """The t that Student's distribution exceeds, on either side, with probability `error`; 1.96 for 0.05 and infinity.

    Args:
        error: above 0 and at most 1.
        freedom: degrees of freedom, above 0, not necessarily whole; may be infinite.
    """
    return float(_scipy_stats().t.isf(error / 2, freedom))


def difference(left: Any, right: Any) -> Estimate:
    """The left mean minus the right one.

    Args:
        left: outcomes (seeds, problems) of one method: a number each, or true and false.
        right: outcomes of the other, on the same problems; the number of seeds may differ.

    Raises:
        DataError: not two matrices of finite numbers over the same problems, at least two of them.
    """
    X, Y = _matrix(left), _matrix(right)
    if X.shape[1] != Y.shape[1]:
        raise DataError(f"outcomes on {X.shape[1]} and on {Y.shape[1]} problems; compare on the same problems")
    value, variance, freedom = difference_moments(X, Y)
    return Estimate(float(value), math.sqrt(variance), float(freedom), X.shape[1])


def mean(outcome: Any) -> Estimate:
    """One method's mean over seeds and problems.

    Args:
        outcome: (seeds, problems).

    Raises:
        DataError: as `difference`.
    """
    X = _matrix(outcome)
    value, variance, freedom = _moments((X,), X.mean(0))
    return Estimate(float(value), math.sqrt(variance), float(freedom), X.shape[1])


def difference_moments(X: NDArray, Y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Difference, its variance and its degrees of freedom, for stacks of matrices (..., seeds, problems)."""
    return _moments((X, Y), X.mean(-2) - Y.mean(-2))


def _moments(matrices: Sequence[NDArray], by_problem: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    problems = by_problem.shape[-1]
    total = by_problem.var(-1, ddof=1) / problems
    squares = total**2 / (problems - 1)
    if all(X.shape[-2] > 1 for X in matrices):
        rest = np.sum([_residual(X) for X in matrices], axis=0)
        of_seeds, freedom = _seed_variance(matrices)
        squares = squares + of_seeds**2 / freedom
        total = np.maximum(total + of_seeds - rest, rest)
    freedom = np.divide(total**2, squares, out=np.full_like(total, problems - 1.0), where=squares > 0)
    return by_problem.mean(-1), total, freedom


def _seed_variance(matrices: Sequence[NDArray]) -> tuple[NDArray, NDArray]:
    """Variance of the difference (or the mean) through the seeds, and its degrees of freedom."""
    parts = [X.mean(-1).var(-1, ddof=1) / X.shape[-2] for X in matrices]
    fewest = min(X.shape[-2] for X in matrices) - 1
    total = np.sum(parts, axis=0)
    squares = np.sum([part**2 / (X.shape[-2] - 1) for part, X in zip(parts, matrices, strict=True)], axis=0)
    most = np.full_like(total, float(len(matrices) * fewest))
    return total, np.minimum(np.divide(total**2, squares, out=most.copy(), where=squares > 0), most)


def _residual(X: NDArray) -> NDArray:
    """Variance of the mean of X (..., seeds, problems) that neither seeds nor problems explain."""
    seeds, problems = X.shape[-2:]
    rest = X - X.mean(-1, keepdims=True) - X.mean(-2, keepdims=True) + X.mean((-1, -2), keepdims=True)
    return (rest**2).sum((-1, -2)) / ((seeds - 1) * (problems - 1) * seeds * problems)


def _matrix(outcome: Any) -> NDArray:
    try:
        X = np.asarray(outcome, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            "outcomes are not a matrix of numbers; give one row a seed, each over the same problems"
        ) from error
    if X.ndim != 2 or X.shape[0] < 1 or X.shape[1] < 2:
        raise DataError(f"outcomes have shape {X.shape}; give (seeds, problems), at least one seed and two problems")
    if not np.isfinite(X).all():
        raise DataError("outcomes are not all finite; leave diverged runs out")
    return X


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number a seed (seconds, forgetting); with a single seed its error is not known.

    Raises:
        DataError: no values.
    """
    if not values:
        raise DataError("there is no value to take the mean of; give one number a seed")
    count, centre = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(centre, math.inf, 1.0, 1)
    variance = math.fsum((value - centre) ** 2 for value in values) / (count - 1) / count
    return Estimate(centre, math.sqrt(variance), count - 1.0, count)


def share_interval(correct: Any, error: float = 0.05) -> tuple[float, float]:
    """An interval of an accuracy over seeds and problems that stays between 0 and 1.

    Wilson's, for as many independent answers as would have the standard error that was found. Answers that never vary
    count once a problem.

    Args:
        correct: (seeds, problems), true and false.
        error: probability of missing the truth.
    """
    found = mean(correct)
    share = min(max(found.value, 0.0), 1.0)
    independent = found.problems if not found.standard_error else share * (1 - share) / found.standard_error**2
    freedom = found.freedom if found.standard_error else math.inf
    return wilson(share * independent, independent, t_quantile(error, freedom))


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """The exact two-sided p-value of McNemar's test (Psychometrika 12, 1947), for one run each on the same problems.

    It tells whether these two runs differ, not whether their methods do.

    Raises:
        DataError: the runs answered different numbers of problems.
    """
    if len(left) != len(right):
        raise DataError(f"{len(left)} and {len(right)} answers; McNemar's test needs both runs on the same problems")
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    differing = only_left + only_right
    return float(_scipy_stats().binomtest(only_left, differing).pvalue) if differing else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for making all these comparisons (Scandinavian Journal of Statistics 6, 1979).

    Calling those at or below `error` makes one or more false calls with at most that probability.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _scipy_stats() -> Any:
    with extra("report", "statistics of a comparison need scipy"):
        from scipy import stats
    return stats
