"""Everything that a comparison's report says, made once for all its forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..style import Look, looks_of
from .curves import smoothing
from .drawing import Figure
from .figures import all_figures
from .null_arm import NullRate, null_rate
from .table import Table, costs_of, quality_of, quantisation_of
from .verdict import (
    CAUTION,
    ERROR,
    FEWEST_SEEDS,
    METRICS,
    Comparison,
    amount,
    compare_methods,
    finished,
    in_words,
    summary,
)

NEEDED = ("methods", "task")
FEW_PROBLEMS = 30


@dataclass(frozen=True)
class Finding:
    """A pair of methods and what each metric says of them."""

    left: str
    right: str
    tone: str
    """better, worse, level or few: how it is coloured."""
    label: str
    sentences: list[str]


@dataclass(frozen=True)
class Page:
    """A report's contents, in the order in which it shows them."""

    title: str
    subtitle: str
    verdict: str
    cautions: list[str]
    """What must be known before the verdict is believed, what is unfinished among it."""
    findings: list[Finding]
    quality: Table
    costs: Table
    figures: dict[str, list[Figure]]
    """By section: differences, curves, rates, null."""
    looks: dict[str, Look]
    null: list[str]
    quantisation: Table
    measured: list[str]
    """How it was."""
    command: str
    facts: list[tuple[str, str]]
    """Versions and hardware."""
    settings: list[tuple[str, str]]


def page_of(results: Mapping[str, Any]) -> Page:
    """What the report of these results says.

    Args:
        results: what `pissa compare` wrote in results.json, finished or not.

    Raises:
        DataError: these are not the results of a comparison.
    """
    missing = [key for key in NEEDED if not isinstance(results.get(key), Mapping)]
    if missing:
        raise DataError(f"results without {', '.join(missing)}; give what `pissa compare` wrote in results.json")
    methods = results["methods"]
    comparisons, null = compare_methods(results), null_rate(results)
    looks = looks_of(methods)
    lengths = [len(run["losses"]) for m in methods.values() for run in finished(m["runs"]) if run.get("losses")]
    return Page(
        title=f"{_listed(list(methods))} on {results['task'].get('name', 'a task')}",
        subtitle=_subtitle(results),
        verdict=summary(comparisons),
        cautions=list(_cautions(results, comparisons)),
        findings=_findings(comparisons),
        quality=quality_of(results),
        costs=costs_of(results),
        figures=all_figures(results, comparisons, null, looks, smoothing(min(lengths, default=1))),
        looks=looks,
        null=_null_words(results, null),
        quantisation=quantisation_of(results),
        measured=_measured(comparisons, searched=any(method["trials"] for method in methods.values())),
        command=str(results.get("command") or ""),
        facts=[*_flat(results.get("versions")), *_flat(results.get("hardware"))],
        settings=_flat(results.get("settings")),
    )


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    if len(names) < 2:
        return names[0] if names else "Nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _plan(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return (results.get("settings") or {}).get("plan") or {}


def _subtitle(results: Mapping[str, Any]) -> str:
    plan, task, model = _plan(results), results["task"], (results.get("settings") or {}).get("model")
    rank = (plan.get("recipe") or {}).get("rank")
    parts = [
        (Path(str(model)).name, model),
        (f"{plan.get('steps')} steps", plan.get("steps")),
        (f"rank {rank}", rank),
        ("one seed" if plan.get("seeds") == 1 else f"{plan.get('seeds')} seeds", plan.get("seeds")),
        (f"{task.get('train_rows')} rows to learn from", task.get("train_rows")),
        (f"{task.get('test_rows')} to test on", task.get("test_rows")),
    ]
    return " · ".join(text for text, given in parts if given)


def _findings(comparisons: Sequence[Comparison]) -> list[Finding]:
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        pairs.setdefault((comparison.left, comparison.right), []).append(comparison)
    return [
        Finding(left, right, *_label(left, right, found), [in_words(comparison) for comparison in found])
        for (left, right), found in pairs.items()
    ]


def _label(left: str, right: str, found: Sequence[Comparison]) -> tuple[str, str]:
    winners = {comparison.better for comparison in found} - {None}
    if not any(comparison.enough for comparison in found):
        return "few", "too few seeds"
    if not winners:
        return "level", "no detectable difference"
    if winners == {left}:
        return "better", "better"
    return ("worse", "worse") if winners == {right} else ("level", "better in one, worse in the other")


def _cautions(results: Mapping[str, Any], comparisons: Sequence[Comparison]) -> Iterator[str]:
    methods, plan = results["methods"], _plan(results)
    for warning in results.get("warnings") or ():
        yield f"{warning[0].upper()}{warning[1:]}."
    for name, method in methods.items():
        yield from _cautions_of(name, method, plan.get("seeds"))
    if plan.get("null") and not (results.get("null") or {}).get("runs"):
        yield "Unfinished: the null arm has not run yet."
    rates = plan.get("rates")
    if isinstance(rates, Sequence) and len(rates) == 1 and len(methods) > 1:
        yield (
            f"All methods ran at one learning rate ({rates[0]:g}), without a search: this shows which learns faster at "
            "that rate, not which is better at its own."
        )
    if any(comparison.estimate.problems < FEW_PROBLEMS for comparison in comparisons):
        yield f"Fewer than {FEW_PROBLEMS} test problems: intervals and verdict are rough."


def _cautions_of(name: str, method: Mapping[str, Any], asked: int | None) -> Iterator[str]:
    made, done = len(method["runs"]), len(finished(method["runs"]))
    diverged = made - done
    if not made and method["trials"] and all(trial["status"] != "done" for trial in method["trials"]):
        yield f"{name}: every run of its search diverged; it is not compared."
    elif made < (asked or 1):
        yield f"Unfinished: {name} has {made} of {asked or 'its'} runs; the same command goes on with them."
    if diverged:
        yield (
            f"{name}: {diverged} of {made} runs diverged and {'is' if diverged == 1 else 'are'} in none of the means: "
            "a method that may diverge is worse than its means say."
        )
    if method.get("on_edge") and done:
        yield f"{name}: its learning rate lies on the edge of what was tried; a better one may lie beyond."


def _null_words(results: Mapping[str, Any], null: NullRate | None) -> list[str]:
    if null is None:
        runs = len(finished((results.get("null") or {}).get("runs") or []))
        return [
            f"No null arm to judge by yet: it needs {FEWEST_SEEDS} finished runs of its own, and as many of the method "
            f"that it repeats; it has {runs}."
        ]
    low, high = null.interval
    left, right = null.seeds
    promise = "at most 5 %, as promised" if null.share <= ERROR else "MORE than the 5 % promised: trust no verdict here"
    units = {metric.name: metric for metric in METRICS}
    return [
        f"{null.method} against itself, reseeded: of {null.resamples} random regroupings of {left + right} runs into "
        f"{left} and {right}, each on test problems drawn anew, the tool called a difference in {null.called}: "
        f"{100 * null.share:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %), {promise}. There are "
        f"{null.groupings} ways to group these runs, so that this is a check, not a proof.",
        "In 95 % of the resamples a difference of nothing is below "
        + " and ".join(f"{amount(units[name], null.spread(name))} ({name})" for name in null.differences)
        + ".",
    ]


def _measured(comparisons: Sequence[Comparison], *, searched: bool) -> list[str]:
    count = sum(comparison.enough for comparison in comparisons)
    return [
        "Learning rates are chosen on the validation rows, with the same budget of steps for every method; everything "
        "else is measured on the test rows."
        if searched
        else "The learning rate was given, none was searched; everything is measured on the test rows.",
        "A difference is the first method’s figure minus the second’s, with the interval that the verdict rests on. It "
        "is judged by Student’s t with two sources of noise, the seeds and the test problems (the same for all "
        "methods); seeds are not paired. Test loss is the mean over test problems of nats per token, in "
        "the table over all of them, while they train over the first ones; validation loss pools the tokens of its "
        "rows.",
        f"{count} comparison{'s' if count != 1 else ''} made together, corrected by Holm’s procedure: the probability "
        f"of one or more false calls is at most {100 * ERROR:g} %. P-values are taken {CAUTION:g} times as large as "
        "Student’s t gives them, because with few seeds it is too eager. An interval of a difference has the level at "
        "which it was tested; intervals in the tables are 95 %, one by one.",
        f"A verdict needs {FEWEST_SEEDS} finished seeds of both methods. “Most likely seen” means in four of five "
        "comparisons like this one.",
        "Steps to a method’s loss: until the mean training loss of ten steps is down to that of its last ten; the "
        "median over the seeds, and their range. Training time is that of the steps; peak memory is the largest of all "
        "runs.",
    ]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines."""
    if not isinstance(value, Mapping):
        return [(prefix, _plain(value))] if prefix else []
    return [line for key, inner in value.items() for line in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
