"""The final table: one row a method, every figure with what is known of its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curves import final_losses, steps_to_loss
from .statistics import Estimate, mean, mean_over_seeds, share_interval
from .verdict import METRICS, finished, outcomes, reference_of

MISSING = "–"
BASE = "base, before"
ACCURACY, LOSS = METRICS


@dataclass(frozen=True)
class Cell:
    """A figure as people read it."""

    text: str
    detail: str = ""
    """Its interval, or what else must be known; smaller, below it."""


NOTHING = Cell(MISSING)


@dataclass(frozen=True)
class Table:
    """Heads of its columns, and (method, cells) row by row."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def quality_of(results: Mapping[str, Any]) -> Table:
    """What the methods reached, with the base in the first row; columns in which any method has a figure."""
    methods = results["methods"]
    reference = reference_of([name for name in methods if finished(methods[name]["runs"])])
    target = statistics.fmean(losses) if reference and (losses := final_losses(methods[reference]["runs"])) else None
    columns = {
        "learning rate": _rate,
        "seeds": lambda method: _seeds(method, _asked(results)),
        "accuracy": _accuracy,
        "test loss": _loss,
        "perplexity of other text": _forgetting,
        f"steps to {reference}’s loss": lambda method: _steps(method["runs"], target),
    }
    table = _table(methods, columns)
    if not results.get("base"):
        return table
    return Table(table.heads, [(BASE, [_of_base(results["base"], head) for head in table.heads]), *table.rows])


def costs_of(results: Mapping[str, Any]) -> Table:
    """What the methods took."""
    columns = {
        "training": lambda method: _mean(method["runs"], "seconds", _duration),
        "initialisation": lambda method: _mean(method["runs"], "init_seconds", _duration),
        "tokens/s": lambda method: _mean(method["runs"], "tokens_per_second", lambda value: f"{value:.0f}"),
        "peak memory": _memory,
        "trainable": _parameters,
    }
    return _table(results["methods"], columns)


def _table(methods: Mapping[str, Any], columns: Mapping[str, Callable[[Any], Cell]]) -> Table:
    rows = {name: {head: cell(method) for head, cell in columns.items()} for name, method in methods.items()}
    used = [head for head in columns if any(row[head] != NOTHING for row in rows.values())]
    return Table(used, [(name, [row[head] for head in used]) for name, row in rows.items()])


def quantisation_of(results: Mapping[str, Any]) -> Table:
    """The quantisation errors that the methods' first runs found; no rows where nothing was quantised."""
    found = {name: method.get("quantization_error") for name, method in results["methods"].items()}
    errors = {name: error for name, error in found.items() if isinstance(error, Mapping)}
    heads = list(dict.fromkeys(key for error in errors.values() for key in error))
    rows = [(name, [_plain(error.get(head)) for head in heads]) for name, error in errors.items()]
    return Table([head.replace("_", " ").replace("quantization", "quantisation") for head in heads], rows)


def _plain(value: Any) -> Cell:
    if value is None:
        return NOTHING
    return Cell(f"{value:.4g}" if isinstance(value, float) else str(value))


def _asked(results: Mapping[str, Any]) -> int | None:
    plan = results.get("settings", {}).get("plan", {})
    return plan.get("seeds") if isinstance(plan, Mapping) else None


def _of_base(base: Mapping[str, Any], head: str) -> Cell:
    if head == "accuracy" and base.get("test_correct"):
        return Cell(f"{100 * statistics.fmean(base['test_correct']):.1f} %")
    if head == "test loss" and base.get("test_losses"):
        return Cell(f"{statistics.fmean(base['test_losses']):.4f}")
    if head == "perplexity of other text" and base.get("perplexity"):
        return Cell(f"{base['perplexity']:.2f}")
    return NOTHING


def _rate(method: Mapping[str, Any]) -> Cell:
    if method.get("learning_rate") is None:
        return NOTHING
    return Cell(f"{method['learning_rate']:.3g}", "on the edge" if method.get("on_edge") else "")


def _seeds(method: Mapping[str, Any], asked: int | None) -> Cell:
    done, diverged = len(finished(method["runs"])), sum(run["status"] == "diverged" for run in method["runs"])
    text = f"{done}" if asked is None or done == asked else f"{done} of {asked}"
    return Cell(text, f"{diverged} diverged" if diverged else "")


def _accuracy(method: Mapping[str, Any]) -> Cell:
    rows = outcomes(method["runs"], ACCURACY)
    if not rows:
        return NOTHING
    low, high = share_interval(rows)
    return Cell(f"{100 * mean(rows).value:.1f} %", f"{100 * low:.1f} – {100 * high:.1f}" + _single(rows))


def _loss(method: Mapping[str, Any]) -> Cell:
    rows = outcomes(method["runs"], LOSS)
    return _interval(mean(rows), lambda value: f"{value:.4f}", _single(rows)) if rows else NOTHING


def _single(rows: Sequence[Any]) -> str:
    return ", one seed" if len(rows) == 1 else ""


def _forgetting(method: Mapping[str, Any]) -> Cell:
    pairs = [(run.get("perplexity_before"), run.get("perplexity_after")) for run in finished(method["runs"])]
    known = [(before, after) for before, after in pairs if before and after]
    if not known:
        return NOTHING
    change = mean_over_seeds([math.log(after / before) for before, after in known])
    low, high = (_percent(bound).removesuffix(" %") for bound in change.interval())
    text = f"{statistics.fmean(after for _, after in known):.2f}"
    return Cell(text, _percent(change.value) + (f" ({low} to {high})" if math.isfinite(change.standard_error) else ""))


def _percent(log_ratio: float) -> str:
    if not math.isfinite(log_ratio):
        return MISSING
    return f"{100 * math.expm1(log_ratio):+.1f} %".replace("-", "−")


def _steps(runs: Sequence[Mapping[str, Any]], target: float | None) -> Cell:
    losses = [run["losses"] for run in finished(runs) if run.get("losses")]
    if target is None or not losses:
        return NOTHING
    found = [steps_to_loss(values, target) for values in losses]
    reached = sorted(step for step in found if step is not None)
    never = len(found) - len(reached)
    if not reached:
        return Cell("never")
    spread = f"{reached[0]} – {reached[-1]}" if len(reached) > 1 else ""
    missed = f"never in {never} of {len(found)}" if never else ""
    return Cell(f"{statistics.median(reached):.0f}", ", ".join(part for part in (spread, missed) if part))


def _mean(runs: Sequence[Mapping[str, Any]], key: str, shown: Any) -> Cell:
    values = [run[key] for run in finished(runs) if run.get(key) is not None]
    return _interval(mean_over_seeds(values), shown) if values else NOTHING


def _interval(estimate: Estimate, shown: Any, note: str = "") -> Cell:
    if not math.isfinite(estimate.standard_error):
        return Cell(shown(estimate.value))
    low, high = estimate.interval()
    return Cell(shown(estimate.value), f"{shown(low)} – {shown(high)}{note}")


def _duration(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(method: Mapping[str, Any]) -> Cell:
    values = [run["peak_memory_gib"] for run in finished(method["runs"]) if run.get("peak_memory_gib")]
    return Cell(f"{max(values):.2f} GiB") if values else NOTHING


def _parameters(method: Mapping[str, Any]) -> Cell:
    values = {run["trainable_parameters"] for run in finished(method["runs"]) if run.get("trainable_parameters")}
    return Cell(", ".join(_count(value) for value in sorted(values))) if values else NOTHING


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"
