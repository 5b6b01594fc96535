"""From the parts of a claim to a verdict, by their intervals alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from .interval import Interval, paired_difference
from .study import Verdict

Row = Mapping[str, Any]


def verdict_of(parts: Mapping[str, Interval]) -> Verdict:
    """The verdict on a claim whose parts each say that a difference is positive.

    It holds where every interval lies above 0, does not hold where none does, and holds in part in between: what the
    seeds cannot decide counts as not shown.
    """
    shown = [part.above_zero for part in parts.values()]
    return "holds" if all(shown) else "holds in part" if any(shown) else "does not hold here"


class Counts(NamedTuple):
    """How many parts of a claim were shown, contradicted and left undecided."""

    shown: int
    against: int
    undecided: int


def count(parts: Mapping[str, Mapping[str, Any]]) -> Counts:
    """How many of a document's parts were shown, went the other way, or stayed undecided."""
    shown = sum(part["low"] is not None and part["low"] > 0 for part in parts.values())
    against = sum(part["high"] is not None and part["high"] < 0 for part in parts.values())
    return Counts(shown, against, len(parts) - shown - against)


def tally(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in words: `shown in 3 of 5 parts, …`, or `undecided in 5 of 5 parts` where that is all."""
    shown, against, undecided = count(parts)
    if undecided == len(parts):
        return f"undecided in {undecided} of {len(parts)} parts"
    others = ((f"the opposite in {against}", against), (f"undecided in {undecided}", undecided))
    return ", ".join([f"shown in {shown} of {len(parts)} parts", *(text for text, number in others if number)])


def standing(difference: Interval) -> str:
    """Whether a difference that was claimed to be positive is."""
    if difference.above_zero:
        return "shown"
    return "the opposite" if difference.below_zero else "undecided"


def listed(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """A document's parts: name, difference with its interval, and what the seeds say of it."""
    found = {name: Interval(**{**part, "values": tuple(part["values"])}) for name, part in parts.items()}
    return [(name, str(part), standing(part)) for name, part in found.items()]


def by_seed(rows: Iterable[Row], value: str | Callable[[Row], float], **chosen: Any) -> list[float]:
    """One value for each seed, in the order of the seeds: the mean over the rows that it has.

    Args:
        rows: cells, each with its seed.
        value: the entry to average, or what to take of a row.
        chosen: entries that the rows must have; a list or tuple means any of its members.
    """
    found: dict[int, list[float]] = {}
    for row in rows:
        if all(
            row[name] in want if isinstance(want, list | tuple) else row[name] == want for name, want in chosen.items()
        ):
            found.setdefault(row["seed"], []).append(row[value] if isinstance(value, str) else value(row))
    return [fmean(found[seed]) for seed in sorted(found)]


def advantage(
    rows: Sequence[Row], value: str | Callable[[Row], float], left: Mapping[str, Any], right: Mapping[str, Any]
) -> Interval:
    """The interval of `left − right`, seed by seed, each averaged over its rows."""
    return paired_difference(by_seed(rows, value, **left), by_seed(rows, value, **right))
