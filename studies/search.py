"""Each method at the learning rate that suits it, found without looking at what it is judged on.

The search has a seed of its own and is meant for examples of its own (`validation`). Its grid grows by the same factor
while the best rate lies at an end of it, so that "the best rate" is one with worse ones on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pissa.errors import ConfigError, TrainingError
from pissa.training.rate_search import best_rate, is_on_edge, rate_beyond

from .study import Settings

SEARCH_SEED = 1000
"""The first seed of every search; no study's seeds begin there."""
GROWTH = 4
"""Rates by which a grid grows, at most."""


@dataclass(frozen=True)
class Search:
    """What a search found."""

    best: dict[str, float]
    """Method -> its learning rate."""
    values: dict[str, dict[str, float | None]]
    """Method -> rate, as text -> what was minimised; None where training failed. Empty where nothing was tried."""

    @property
    def at_edge(self) -> list[str]:
        """Methods whose best rate is still the lowest or the highest that was tried."""
        tried = {method: [*map(float, values)] for method, values in self.values.items()}
        return [method for method, rate in self.best.items() if tried[method] and is_on_edge(rate, tried[method])]

    def as_dict(self) -> dict[str, Any]:
        """What a study's results hold of it."""
        return {"seed": SEARCH_SEED, "best": self.best, "at_edge": self.at_edge, "values": self.values}

    def __str__(self) -> str:
        """The rates in one line, and which of them the grid does not enclose."""
        rates = ", ".join(f"{method} {rate:.2g}" for method, rate in self.best.items())
        return f"{rates} (at the end of its grid: {', '.join(self.at_edge)})" if self.at_edge else rates


def search_rates(
    settings: Settings,
    study: str,
    rates: Mapping[str, Sequence[float]],
    measure: Callable[..., dict[str, Any]],
    value: str | Callable[[Mapping[str, Any]], float] = "held_out_loss",
    runs: int = 1,
    **about: Any,
) -> Search:
    """The learning rate of least `value` for every method.

    Args:
        settings: of the study; a quick pass does not search, it takes the middle of the grid.
        study: its name.
        rates: method -> where to begin, ascending by one factor.
        measure: called with `method`, `rate`, `seed` and what `about` holds; returns a cell's values. A run that
            raises `TrainingError` counts as worse than any other.
        value: the entry to minimise, or what to take of a cell.
        runs: at each rate, whose mean is minimised; their seeds follow on SEARCH_SEED.
        about: what else decides a cell's result.

    Raises:
        ConfigError: no rates, or rates that do not ascend.
    """
    for method, grid in rates.items():
        if not grid or list(grid) != sorted(set(grid)):
            raise ConfigError(f"rates of {method} are {list(grid)}; give at least one, ascending")
    if settings.scale == "quick":
        middle = {method: grid[len(grid) // 2] for method, grid in rates.items()}
        return Search(middle, {method: {} for method in rates})

    def tried(**key: Any) -> dict[str, Any]:
        try:
            return measure(**key)
        except TrainingError as error:
            return {"failed": str(error)}

    take = itemgetter(value) if isinstance(value, str) else value
    found: dict[str, dict[float, float]] = {method: {} for method in rates}
    wanted = [(method, rate) for method, grid in rates.items() for rate in grid]
    for _ in range(GROWTH + 1):
        keys = [
            {"method": method, "rate": rate, "seed": SEARCH_SEED + run, **about}
            for method, rate in wanted
            for run in range(runs)
        ]
        for row in settings.grid(f"{study}-search", keys, tried):
            own = math.inf if "failed" in row else take(row)
            found[row["method"]].setdefault(row["rate"], 0.0)
            found[row["method"]][row["rate"]] += own / runs
        wanted = [(method, further) for method, tried_here in found.items() if (further := rate_beyond(tried_here))]
        if not wanted:
            break
    best = {method: best_rate(values) for method, values in found.items()}
    shown = {
        method: {f"{rate:g}": value if math.isfinite(value) else None for rate, value in sorted(values.items())}
        for method, values in found.items()
    }
    return Search(best, shown)
