"""Which method is better, from what `pissa compare` measured: all comparisons, corrected for their number, in words.

Every method is compared with LoRA (where there is no `lora`, with the first method), and every quantised one with
`qlora` as well, in accuracy and in test loss. Whether the tests keep their promise is simulated in
tests/lab/test_statistics.py, and measured on the data at hand by the null arm (`null_arm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...training.recipe import QUANTIZED_METHODS
from .statistics import Estimate, difference, holm, mcnemar

ERROR = 0.05
"""Greatest probability of one or more false calls."""
CAUTION = 1.25
"""P-values of Student's t are taken this much larger: with three seeds they come out up to a fifth too small, and false
calls are to stay below 5 % in the worst case, not on average."""
FEWEST_SEEDS = 3
"""Fewer finished runs of a method do not tell how much its seeds differ."""


@dataclass(frozen=True)
class Metric:
    """One outcome per test problem."""

    name: str
    key: str
    """Where a run has it."""
    higher_is_better: bool
    unit: str


METRICS = (
    Metric("accuracy", "test_correct", True, "points"),
    Metric("test loss", "test_losses", False, "nats per token"),
)


@dataclass(frozen=True)
class Comparison:
    """Two methods, one metric."""

    metric: Metric
    left: str
    right: str
    seeds: tuple[int, int]
    """Finished runs of each."""
    estimate: Estimate
    """Left minus right."""
    p_value: float
    adjusted_p: float
    """Holm's, over all comparisons that were made together."""
    error: float
    """The level at which this one was tested in Holm's procedure."""
    enough: bool
    """Whether both have the seeds that a verdict needs."""

    @property
    def called(self) -> bool:
        """Whether a difference is claimed."""
        return self.enough and self.adjusted_p <= ERROR

    @property
    def better(self) -> str | None:
        """The method that is called better."""
        if not self.called:
            return None
        return self.left if (self.estimate.value > 0) == self.metric.higher_is_better else self.right

    @property
    def interval(self) -> tuple[float, float]:
        """The difference's interval at the level at which it was tested; it leaves out 0 where a call is made."""
        return self.estimate.interval(self.error / CAUTION)

    @property
    def smallest_detectable(self) -> float:
        """The true difference that would have been called in four of five comparisons like this one."""
        return self.estimate.smallest_detectable(self.error / CAUTION)


def finished(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that have been trained to the end and tested."""
    return [run for run in runs if run.get("status") == "done"]


def outcomes(runs: Sequence[Mapping[str, Any]], metric: Metric) -> list[list[float]] | None:
    """(seeds, problems) of the finished runs, or None where they have no such outcome.

    Raises:
        DataError: some runs have it and some have not.
    """
    rows = [run.get(metric.key) for run in finished(runs)]
    found = [row for row in rows if row is not None]
    if found and len(found) < len(rows):
        raise DataError(f"{len(rows) - len(found)} of {len(rows)} finished runs have no {metric.key}; run them again")
    return found or None


def reference_of(methods: Sequence[str]) -> str | None:
    """What the others are compared with: `lora`, or the first method where there is no lora; None of none."""
    return "lora" if "lora" in methods else next(iter(methods), None)


def pairs_of(methods: Sequence[str]) -> list[tuple[str, str]]:
    """(method, what it is compared with), in the order of the methods.

    Args:
        methods: names, as the user gave them.
    """
    reference = reference_of(methods)
    pairs = [(method, reference) for method in methods if reference is not None and method != reference]
    if "qlora" in methods and reference != "qlora":
        pairs += [(method, "qlora") for method in methods if method in QUANTIZED_METHODS and method != "qlora"]
    return pairs


def compare_methods(results: Mapping[str, Any], pairs: Sequence[tuple[str, str]] | None = None) -> list[Comparison]:
    """All comparisons of what has finished.

    Args:
        results: what `pissa compare` wrote in results.json.
        pairs: (left, right) names of methods; None for those of `pairs_of`.

    Raises:
        DataError: a pair names a method that is not there, or outcomes that are not on the same problems.
    """
    methods = results["methods"]
    pairs = pairs_of([name for name in methods if finished(methods[name]["runs"])]) if pairs is None else pairs
    unknown = sorted({name for pair in pairs for name in pair} - set(methods))
    if unknown:
        raise DataError(f"there are no results of {', '.join(unknown)}; methods with results: {', '.join(methods)}")
    found = []
    for metric in METRICS:
        for left, right in pairs:
            X, Y = (outcomes(methods[name]["runs"], metric) for name in (left, right))
            if X and Y:
                found.append((metric, left, right, X, Y))
    return decide(found)


def decide(found: Sequence[tuple[Metric, str, str, Any, Any]]) -> list[Comparison]:
    """Test (metric, left, right, left outcomes, right outcomes) together, corrected for their number."""
    estimates = [difference(X, Y) for _, _, _, X, Y in found]
    enough = [min(len(X), len(Y)) >= FEWEST_SEEDS for _, _, _, X, Y in found]
    p_values = [
        _single_runs(metric, X, Y) if len(X) == len(Y) == 1 else cautious(estimate.p_value)
        for (metric, _, _, X, Y), estimate in zip(found, estimates, strict=True)
    ]
    tested = [index for index in range(len(found)) if enough[index]]
    adjusted, levels = dict.fromkeys(range(len(found)), 1.0), dict.fromkeys(range(len(found)), ERROR)
    adjusted.update(zip(tested, holm([p_values[index] for index in tested]), strict=True))
    levels.update(zip(tested, _levels([p_values[index] for index in tested]), strict=True))
    return [
        Comparison(metric, left, right, (len(X), len(Y)), estimates[i], p_values[i], adjusted[i], levels[i], enough[i])
        for i, (metric, left, right, X, Y) in enumerate(found)
    ]


def cautious(p_value: float) -> float:
    """A p-value of Student's t, made larger by what few seeds make it too small."""
    return min(1.0, CAUTION * p_value)


def _single_runs(metric: Metric, X: Sequence[Any], Y: Sequence[Any]) -> float:
    if metric.key == "test_correct":
        return mcnemar(X[0], Y[0])
    return difference(X, Y).p_value


def _levels(p_values: Sequence[float]) -> list[float]:
    """What each p-value is held against: Holm's step for those called, the first step not passed for all others."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels, stopped = [ERROR] * len(p_values), None
    for place, index in enumerate(order):
        level = ERROR / (len(p_values) - place)
        if stopped is None and p_values[index] > level:
            stopped = level
        levels[index] = stopped or level
    return levels


def in_words(comparison: Comparison) -> str:
    """What a comparison shows, in a sentence or two for beside the names of its methods."""
    c, metric = comparison, comparison.metric
    found = f"{metric.name.capitalize()}: {signed(metric, c.estimate.value)} {metric.unit}"
    if not c.enough:
        return (
            f"{found}, but with {c.seeds[0]} and {c.seeds[1]} finished seeds a method cannot be told from luck; "
            f"{FEWEST_SEEDS} of each are needed."
        )
    low, high = c.interval
    found += f" ({signed(metric, low)} to {signed(metric, high)}; p\u00a0{probability(c.adjusted_p)})."
    if c.better is not None:
        return f"{found} {c.better} is better."
    if not c.estimate.standard_error:
        return f"{found} No outcome ever varied: these problems cannot tell the methods apart."
    return (
        f"{found} No detectable difference; a true one of {amount(metric, c.smallest_detectable)} would most likely "
        "have been seen."
    )


def amount(metric: Metric, value: float) -> str:
    """A difference with its unit; of accuracies in percentage points."""
    return f"{_number(metric, value, '')} {metric.unit}"


def signed(metric: Metric, value: float) -> str:
    """A difference with its sign."""
    return _number(metric, value, "+").replace("-", "−")


def _number(metric: Metric, value: float, sign: str) -> str:
    return format(100 * value, f"{sign}.1f") if metric.unit == "points" else format(value, f"{sign}.4f")


def probability(p: float) -> str:
    """= 0.012, or < 0.001."""
    return "<\u00a00.001" if p < 0.001 else f"=\u00a0{p:.2g}" if p < 0.995 else "=\u00a01"


def summary(comparisons: Sequence[Comparison]) -> str:
    """The verdict in a sentence or a few: what is better than what, and what cannot be told apart."""
    if not comparisons:
        return "Nothing to compare yet: no two methods have finished runs."
    if not any(comparison.enough for comparison in comparisons):
        return f"No verdict yet: a method needs {FEWEST_SEEDS} finished seeds, or luck cannot be told from quality."
    winners: dict[tuple[str, str], list[str]] = {}
    for c in comparisons:
        if c.better is not None:
            winners.setdefault((c.better, c.right if c.better == c.left else c.left), []).append(c.metric.name)
    sentences = [
        f"{better} is better than {worse} in {' and '.join(names)}." for (better, worse), names in winners.items()
    ]
    level: dict[str, list[str]] = {}
    for left, right in dict.fromkeys((c.left, c.right) for c in comparisons if c.enough):
        if (left, right) not in winners and (right, left) not in winners:
            level.setdefault(right, []).append(left)
    sentences += [f"No detectable difference from {right}: {', '.join(lefts)}." for right, lefts in level.items()]
    return " ".join(sentences)
