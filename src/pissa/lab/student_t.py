"""Student's t distribution: what a difference of few seeds is measured against.

The two-sided tail P(|T| > t) with v degrees of freedom is the regularised incomplete beta function I_x(v/2, 1/2) at
x = v / (v + t²), here by its continued fraction (Lentz's method; Abramowitz and Stegun, 26.5.8). Degrees of freedom
need not be whole: those of a sum of variances are not.
"""

from __future__ import annotations

import math

NORMAL_FROM = 1e5
"""Degrees of freedom from which on the normal distribution stands in: a tail of 1e-3 is then right to 1e-4 of it."""
ROUNDING = 1e-15
HALVINGS = 60
TINY = 1e-300


def two_sided_tail(t: float, freedom: float) -> float:
    """P(|T| > |t|), between 0 and 1.

    Args:
        t: the statistic, a difference over its standard error.
        freedom: degrees of freedom, above 0, not necessarily whole.
    """
    if math.isinf(t):
        return 0.0
    if freedom >= NORMAL_FROM:
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def quantile(tail: float, freedom: float) -> float:
    """The t whose two-sided tail is `tail`; 1.96 for 0.05 and many degrees of freedom.

    Args:
        tail: P(|T| > t), above 0 and at most 1.
        freedom: degrees of freedom, above 0.
    """
    low, high = 0.0, 1.0
    while two_sided_tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _fraction(x, a, b) / a
    return 1 - math.exp(log_front) * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """1/(1 + d1/(1 + d2/(1 + …))), by Lentz's method."""
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < ROUNDING:
            return value
    raise ArithmeticError(f"the incomplete beta function does not converge at x = {x}, a = {a}, b = {b}")


def _nonzero(value: float) -> float:
    return value if abs(value) > TINY else TINY
