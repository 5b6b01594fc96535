"""The search for a learning rate: what to try next, from the losses so far.

In a comparison every method has the same budget. A rung is a set of complete runs of one length, each with its own
schedule. Rung 0 begins with three rates a factor √10 apart around the method's known good region. Then every further
run of the rung

    goes on beyond the edge, by the same factor, while the best rate so far is the lowest or the highest tried;
    halves (geometrically) the wider of the two gaps beside the best rate otherwise.

The better half of a rung is run again, twice as long, in the next. A run that diverged has an infinite loss: it bounds
the search from above and counts against the budget as any other. What is tried next depends on nothing but the losses
so far, so that a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..optimizers.default_rates import RATES

FACTOR = math.sqrt(10)
FIRST = 3
"""Rates that rung 0 begins with."""
GOOD = {"lora": 2e-3, "pissa": 2e-4, "full": 2e-5}
"""Where a family's best rates were found: for SmolLM2-135M by us, for 7B models by arXiv 2602.04998."""
LORA_LIKE = ("lora", "lora-kaiming", "lora-gaussian", "dora", "adalora", "qlora")


def good_rate(method: str, optimizer: str | None = None) -> float:
    """The middle of a method's known good region: LoRA's for what starts at B = 0, PiSSA's for what starts at a part
    of the weight; under an optimizer that has one rate for all, that."""
    if optimizer in RATES:
        return RATES[optimizer]
    if method == "full":
        return GOOD["full"]
    return GOOD["lora" if method in LORA_LIKE else "pissa"]


def next_rate(tried: Mapping[float, float], middle: float) -> float:
    """The rate of the next run of rung 0.

    Args:
        tried: rate -> validation loss, infinite for a run that diverged.
        middle: of the three rates to begin with.

    Returns:
        A rate that was not tried, rounded to three digits.
    """
    for rate in (middle, middle / FACTOR, middle * FACTOR):
        if _rounded(rate) not in tried:
            return _rounded(rate)
    further = rate_beyond(tried, FACTOR)
    if further is not None:
        return further
    best, rates = best_rate(tried), sorted(tried)
    place = rates.index(best)
    below, above = rates[place - 1], rates[place + 1]
    wider, nearer = math.log(best / below), math.log(above / best)
    if math.isclose(wider, nearer, rel_tol=0.02):
        neighbour = below if tried[below] <= tried[above] else above
    else:
        neighbour = below if wider > nearer else above
    return _rounded(math.sqrt(best * neighbour))


def rate_beyond(tried: Mapping[float, float], factor: float | None = None) -> float | None:
    """The next rate beyond the lowest or the highest one tried, where that is the best so far.

    Args:
        tried: rate -> what is minimised, infinite for a run that diverged.
        factor: from the best rate to the next; None for the one between the best rate and its neighbour.

    Returns:
        A rate rounded to three digits; None where worse ones enclose the best, or where a single rate has no neighbour.
    """
    best, rates = best_rate(tried), sorted(tried)
    if best not in (rates[0], rates[-1]) or (factor is None and len(rates) == 1):
        return None
    towards = -1 if best == rates[0] else 1
    if factor is None:
        factor = rates[1] / best if towards < 0 else best / rates[-2]
    return _rounded(best * factor**towards)


def next_on_grid(
    tried: Mapping[float, float], start: float, least: float = 0.0, most: float = math.inf
) -> float | None:
    """The next rate of a search that knows nothing: downhill by a factor √10, then half as far on both sides.

    Args:
        tried: rate -> loss, infinite for what diverged; empty to begin with.
        start: the first rate.
        least, most: no rate beyond them is tried.

    Returns:
        A rate rounded to three digits; None where nothing is left to try.
    """
    if not tried:
        return _rounded(start)
    further = rate_beyond(tried, FACTOR)
    if further is not None and least < further < most:
        return further
    grid = [rate for rate in tried if abs(math.remainder(math.log(rate / start, FACTOR), 1)) < 0.1]
    best = best_rate({rate: tried[rate] for rate in grid})
    halves = [_rounded(best * FACTOR**half) for half in (-0.5, 0.5)]
    return next((rate for rate in halves if rate not in tried), None)


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss, the lower one of equals; the lowest of all where every run diverged."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def best_rates(tried: Mapping[float, float], count: int) -> list[float]:
    """The rates with the lowest losses, best first, without those that diverged; the lower one of equals."""
    finite = [rate for rate in tried if math.isfinite(tried[rate])]
    return sorted(finite, key=lambda rate: (tried[rate], rate))[:count]


def is_on_edge(rate: float, tried: Collection[float]) -> bool:
    """Whether nothing was tried on one side of a rate."""
    return rate in (min(tried), max(tried))


def vertex(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss, between those that were tried.

    Args:
        tried: rate -> loss, infinite where a run diverged.

    Returns:
        The vertex of the parabola in log(rate) through the best rate and its neighbours; the best rate itself where it
        is the first or the last, or beside an infinite loss.
    """
    rates = sorted(tried)
    place = min(range(len(rates)), key=lambda index: tried[rates[index]])
    near = rates[max(place - 1, 0) : place + 2]
    if len(near) < 3 or any(math.isinf(tried[rate]) for rate in near):
        return rates[place]
    (a, b, c), (x, y, z) = ([math.log(rate) for rate in near], [tried[rate] for rate in near])
    left, right = (b - a) * (y - z), (b - c) * (y - x)
    if left == right:
        return rates[place]
    return math.exp(b - ((b - a) * left - (b - c) * right) / (2 * (left - right)))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
