"""A comparison's directory, and results.json made from nothing but what lies in it.

OUT/compare.json                          settings, task, versions, hardware, command; written first
OUT/base.json                             the untouched base on the same rows
OUT/search/METHOD/rung-K/lr-RATE/         one run each: run.json, log.jsonl, results.json, trial.json
OUT/runs/METHOD/seed-N/
OUT/null/seed-N/
OUT/results.json                          everything together
OUT/report.html, report.md, *.png         the same for people
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from ...checkpoint.disk.resumable import Resumable
from ...errors import OutputError
from ...outside.documents import read_document
from ...training.rate_search import best_rates, is_on_edge
from .plan import ComparisonPlan
from .trial import TRIAL, Trial

TRIAL_KEYS = ("learning_rate", "rung", "steps", "seed", "status", "validation_loss", "losses", "grad_norms", "seconds")
RUN_KEYS = (
    "seed", "status", "learning_rate", "losses", "grad_norms", "validation_loss", "test_loss", "test_losses",
    "test_correct", "during", "perplexity_before", "perplexity_after", "seconds", "init_seconds", "peak_memory_gib",
    "trainable_parameters", "tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class ComparedPlan:
    """The part of a comparison's plan that its results are put together by."""

    methods: list[str]


@dataclass(frozen=True)
class ComparisonSettings:
    """The settings of a comparison, as compare.json holds them."""

    plan: ComparedPlan


@dataclass(frozen=True)
class ComparisonRecord:
    """What compare.json holds."""

    settings: ComparisonSettings
    task: dict[str, Any] | None = None
    """What the rows are."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """The commands that were given before the one that extended the comparison."""


@dataclass(frozen=True)
class BaseScores:
    """What base.json holds."""

    validation_loss: float
    test_losses: list[float]
    curve_loss: float | None = None
    test_tokens: list[int] | None = None
    test_correct: list[bool] | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """What was measured during a run."""

    step: int
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class TrialRecord:
    """What a trial.json holds."""

    method: str
    learning_rate: float
    seed: int
    rung: int | None
    status: Literal["done", "diverged"]
    validation_loss: float | None
    losses: list[float | None]
    steps: int | None = None
    grad_norms: list[float | None] | None = None
    test_losses: list[float] | None = None
    test_tokens: list[int] | None = None
    test_correct: list[bool] | None = None
    during: list[CurvePoint] | None = None
    perplexity_after: float | None = None
    seconds: float | None = None
    init_seconds: float | None = None
    peak_memory_gib: float | None = None
    trainable_parameters: int | None = None
    tokens_per_second: float | None = None
    quantization_error: dict[str, float | None] | None = None


@dataclass(frozen=True)
class ComparisonDirectory:
    """The places inside one comparison's directory."""

    path: Path
    """OUT."""

    @property
    def resumable(self) -> Resumable:
        """The directory as one that only this comparison may continue."""
        return Resumable(self.path, self.record, "comparison", "comparing", ComparisonRecord)

    @property
    def record(self) -> Path:
        """Settings; there from the beginning."""
        return self.path / "compare.json"

    @property
    def base(self) -> Path:
        """The base's scores."""
        return self.path / "base.json"

    @property
    def results(self) -> Path:
        """Everything together."""
        return self.path / "results.json"

    def search_trial(self, plan: ComparisonPlan, method: str, rate: float, rung: int) -> Trial:
        """A trial of the search."""
        recipe = plan.run_recipe(method, rate, plan.rung_steps[rung], plan.search_seed(rung))
        return Trial(self.path / "search" / method / f"rung-{rung}" / f"lr-{rate:g}", "search", recipe, rung)

    def final_trial(self, plan: ComparisonPlan, method: str, rate: float, seed: int) -> Trial:
        """A run that is reported."""
        recipe = plan.run_recipe(method, rate, plan.steps, seed)
        return Trial(self.path / "runs" / method / f"seed-{seed}", "run", recipe)

    def null_trial(self, plan: ComparisonPlan, method: str, rate: float, seed: int) -> Trial:
        """A run of the null arm."""
        recipe = plan.run_recipe(method, rate, plan.steps, seed)
        return Trial(self.path / "null" / f"seed-{seed}", "null", recipe)

    def search_records(self, method: str) -> list[dict[str, Any]]:
        """The trials of a method's search, rung by rung, by rate."""
        found = _records(self.path / "search" / method, "rung-*/lr-*")
        return sorted(found, key=lambda record: (record["rung"], record["learning_rate"]))

    def null_runs(self) -> list[dict[str, Any]]:
        """The finished runs of the null arm, by seed."""
        return _by_seed(_records(self.path / "null", "seed-*"))


def assemble(directory: ComparisonDirectory) -> dict[str, Any]:
    """What results.json holds, from the directories alone; runs that are missing are missing in it.

    Raises:
        OutputError: the directory is no comparison's, or a file in it is damaged.
    """
    record = read_json(directory.record, ComparisonRecord)
    base = _with_mean(read_json(directory.base, BaseScores)) if directory.base.is_file() else None
    before = base["perplexity"] if base is not None else None
    methods = {method: _method(directory, method, before) for method in record["settings"]["plan"]["methods"]}
    null_runs = directory.null_runs()
    null = [_run(found, before) for found in null_runs]
    named = {run["method"] for run in null_runs}
    rate = null[0]["learning_rate"] if null else None
    return {
        **record,
        "base": base,
        "methods": methods,
        "null": {"method": named.pop(), "learning_rate": rate, "runs": null} if null else None,
    }


def chosen_rate(records: list[dict[str, Any]]) -> float | None:
    """The best rate of the last rung in which any run came through; None where all diverged."""
    for rung in sorted({record["rung"] for record in records}, reverse=True):
        best = best_rates(losses_of(records, rung), 1)
        if best:
            return best[0]
    return None


def losses_of(records: list[dict[str, Any]], rung: int) -> dict[float, float]:
    """Rate -> validation loss of a rung's trials, infinite where one diverged."""
    return {
        record["learning_rate"]: record["validation_loss"] if record["status"] == "done" else math.inf
        for record in records
        if record["rung"] == rung
    }


def read_json(path: Path, schema: type) -> dict[str, Any]:
    """A JSON object of ours.

    Raises:
        OutputError: there is none, or it is not what the schema says.
    """
    remedy = f"{path.parent} cannot be read as a comparison; restore it, or remove it"
    return read_document(path, schema, error=OutputError, remedy=remedy)


def _method(directory: ComparisonDirectory, method: str, before: float | None) -> dict[str, Any]:
    trials = directory.search_records(method)
    runs = _by_seed(_records(directory.path / "runs" / method, "seed-*"))
    rate = runs[0]["learning_rate"] if runs else chosen_rate(trials)
    tried = losses_of(trials, 0)
    errors = [run["quantization_error"] for run in runs if run.get("quantization_error")]
    return {
        "learning_rate": rate,
        "on_edge": rate is not None and len(tried) > 1 and is_on_edge(rate, tried),
        "trials": [{key: trial.get(key) for key in TRIAL_KEYS} for trial in trials],
        "runs": [_run(run, before) for run in runs],
        "quantization_error": errors[0] if errors else None,
    }


def _run(record: dict[str, Any], before: float | None) -> dict[str, Any]:
    return {key: {**_with_mean(record), "perplexity_before": before}.get(key) for key in RUN_KEYS}


def _with_mean(record: dict[str, Any]) -> dict[str, Any]:
    """The record, and with it the test loss that is reported: the mean over problems, None for a run that diverged."""
    losses = record.get("test_losses")
    return {**record, "test_loss": fmean(losses) if losses else None}


def _records(place: Path, pattern: str) -> list[dict[str, Any]]:
    return [read_json(path, TrialRecord) for path in sorted(place.glob(f"{pattern}/{TRIAL}"))]


def _by_seed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["seed"])
