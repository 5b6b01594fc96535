"""`compare`: the search for every method, then the runs that are reported, then the null arm.

Which runs there are to make follows from the runs that are finished, so that the same command goes on where it
stopped, and no state is kept beside the directories.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from ...checkpoint.disk.resumable import as_recorded
from ...checkpoint.disk.write import explained, write_json
from ...checkpoint.saved_residual import check_is_base
from ...checkpoint.source.load import check_model_directory, load_base, load_tokenizer
from ...errors import ConfigError, Interrupted, MissingExtraError
from ...provenance import hardware, package_versions
from ...training.bar import make_progress
from ...training.directory import absolute
from ...training.engine import process_count, storage_dtype
from ...training.rate_search import best_rates, good_rate, next_rate
from ...training.run import quieten
from .continuation import record_to_keep
from .plan import ComparisonPlan
from .record import ComparisonDirectory, assemble, chosen_rate, losses_of
from .report import write_report
from .score import Scorer, make_scorer
from .task import digests, make_task
from .trial import TRIAL, Trial, run_trial, trim


def compare(
    model: str,
    data: str,
    out: str | os.PathLike[str],
    plan: ComparisonPlan,
    *,
    validation: str | None = None,
    test: str | None = None,
    command: str = "",
    quiet: bool = False,
    report: bool = True,
) -> dict[str, Any]:
    """Compare methods on a task; go on where an earlier call stopped, also with more seeds or methods.

    Args:
        model: the base's directory or hub id.
        data: file or hub id to learn from.
        out: the comparison's directory: new, empty, or that of the same comparison.
        plan: methods, runs, steps, and the recipe that all runs share.
        validation: rows by which learning rates are chosen; None to hold some of `data` out.
        test: rows that are reported; None to hold some of `data` out.
        command: how it was called, for the record.
        quiet: no bar, no lines.
        report: write report.html and report.md too.

    Returns:
        What results.json holds.

    Raises:
        MissingExtraError: a report is asked for, and matplotlib, jinja2 or scipy is missing; nothing has run then.
        PissaError: the input or the settings are wrong, or `out` holds something else.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.

    Example:
        >>> from pissa import ComparisonPlan, Recipe, compare
        >>> recipe = Recipe(rank=2, batch_size=2, micro_batch_size=2)
        >>> plan = ComparisonPlan(("lora", "pissa"), recipe, steps=2, seeds=1, rates=(1e-3,), null=False)
        >>> found = compare("base", "rows.jsonl", "comparison", plan, quiet=True, report=False)
        >>> sorted(found["methods"])
        ['lora', 'pissa']
    """
    if process_count() > 1:
        raise ConfigError("a comparison runs in one process; start it without a launcher")
    if report:
        _check_extra()
    quieten()
    directory = ComparisonDirectory(Path(out))
    model = absolute(model)
    check_model_directory(model)
    check_is_base(model)
    task = make_task(data, plan, validation=validation, test=test)
    settings = {"model": model, "data": data, "validation": validation, "test": test, "plan": plan.as_dict()}
    scorer = make_scorer(task, load_tokenizer(model), plan)
    record = {
        "command": command,
        "settings": as_recorded(settings),
        "versions": package_versions(),
        "hardware": hardware(),
        "task": {**task.as_dict(), **digests(plan)},
    }
    record_to_keep(directory, record)  # a directory that is somebody else's is not even locked
    progress = make_progress()
    with explained(directory.path), directory.resumable.held():
        record = record_to_keep(directory, record)
        if scorer.warnings:
            record = {**record, "warnings": list(scorer.warnings)}
        write_json(directory.record, record)
        session = _Session(model, plan, directory, scorer, None if quiet else progress)
        try:
            if quiet:
                session.run()
            else:
                with progress:
                    session.run()
        except KeyboardInterrupt as stopped:
            reason = str(stopped) or "interrupted"
            raise Interrupted(f"{reason} (of the comparison, all finished runs are saved)") from None
        return rebuild(directory.path, report=report)


def rebuild(out: str | os.PathLike[str], *, report: bool = True) -> dict[str, Any]:
    """Write results.json, and the report, again from the directories of a comparison's runs, finished or not.

    Raises:
        MissingExtraError: as `compare`.
        OutputError: `out` is no comparison's, or cannot be written.
    """
    if report:
        _check_extra()
    directory = ComparisonDirectory(Path(out))
    results = assemble(directory)
    write_json(directory.results, results)
    if report:
        write_report(results, directory.path)
    return results


def _check_extra() -> None:
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the report needs {' and '.join(missing)}: pip install 'pissa[report]', or do without it (--no-report)"
        )


@dataclass
class _Session:
    """One call's work; `seconds` and `steps` count what it has done itself."""

    model: str
    plan: ComparisonPlan
    directory: ComparisonDirectory
    scorer: Scorer
    progress: Progress | None
    seconds: float = 0.0
    steps: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.plan.total_steps

    def run(self) -> None:
        """Everything that is not done yet."""
        task = self.scorer.task
        parts = f"{len(task.train)} rows to learn from, {len(task.validation)} for validation, {len(task.test)} to test"
        self._say(f"{task.name}: {parts}" + (f"; {task.removed} removed from training" if task.removed else ""))
        self._say(self.plan.describe())
        for warning in self.scorer.warnings:
            self._say(f"warning: {warning}")
        if not self.directory.base.is_file():
            write_json(self.directory.base, self._base())
        rates = {method: self._rate(method) for method in self.plan.methods}
        for seed in self.plan.final_seeds():
            for method, rate in rates.items():
                if rate is not None:
                    self._do(self.directory.final_trial(self.plan, method, rate, seed))
        method = self.plan.null_method
        if method is not None and (rate := rates[method]) is not None:
            for seed in self.plan.null_seeds():
                self._do(self.directory.null_trial(self.plan, method, rate, seed))

    def _rate(self, method: str) -> float | None:
        """The learning rate of a method's reported runs, given or searched; None where every run diverged."""
        if not self.plan.searches:
            assert self.plan.rates is not None
            return self.plan.rates[0]
        for rung, count in enumerate(self.plan.rung_runs):
            for index in range(count):
                tried = losses_of(self.directory.search_records(method), rung)
                rate = self._next(method, rung, index, tried)
                if rate is not None:
                    self._do(self.directory.search_trial(self.plan, method, rate, rung))
        rate = chosen_rate(self.directory.search_records(method))
        self._say(
            f"{method}: every run of the search diverged; it is not compared"
            if rate is None
            else f"{method}: learning rate {rate:g}"
        )
        return rate

    def _next(self, method: str, rung: int, index: int, tried: dict[float, float]) -> float | None:
        """The rate of a rung's next trial; None for one that is done."""
        if len(tried) > index:
            return None
        if rung:
            before = losses_of(self.directory.search_records(method), rung - 1)
            promoted = best_rates(before, self.plan.rung_runs[rung])
            return promoted[index] if index < len(promoted) else None
        if self.plan.rates is not None:
            return next(rate for rate in self.plan.rates if rate not in tried)
        return next_rate(tried, good_rate(method, self.plan.recipe.optimizer))

    def _do(self, trial: Trial) -> None:
        """One trial, unless it is done; says how it went and how long the rest will take."""
        steps = trial.recipe.max_steps or 0
        self.left -= steps
        if (trial.directory / TRIAL).is_file():
            if not self.plan.keep_runs:
                trim(trial.directory)
            return
        clock = time.perf_counter()
        points = 0 if trial.purpose == "search" else self.plan.curve_points
        with explained(trial.directory):
            trial.directory.parent.mkdir(parents=True, exist_ok=True)
            found = run_trial(
                trial,
                self.model,
                self.scorer,
                curve_points=points,
                keep=self.plan.keep_runs,
                progress=self.progress,
            )
        self.seconds, self.steps = self.seconds + time.perf_counter() - clock, self.steps + steps
        self._clear_bars()
        self._say(f"{trial.label}, {steps} steps: {_outcome(found)}; {_remaining(self)}")

    def _base(self) -> dict[str, Any]:
        """The untouched base's scores."""
        recipe = self.plan.run_recipe(self.plan.methods[0], 1e-5, 1, self.plan.seed)
        base = load_base(self.model, dtype=storage_dtype(recipe)).eval()
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        losses = {"validation_loss": self.scorer.validation_loss(base), "curve_loss": self.scorer.curve_loss(base)}
        scores = {**losses, **self.scorer.test(base)}
        self._say(f"base{_test_loss(scores)}")
        return scores

    def _say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _clear_bars(self) -> None:
        for task in self.progress.task_ids if self.progress is not None else ():
            assert self.progress is not None
            self.progress.remove_task(task)


def _outcome(found: dict[str, Any]) -> str:
    if found["status"] != "done":
        return "diverged"
    return f"validation loss {found['validation_loss']:.4f}{_test_loss(found)}"


def _test_loss(found: dict[str, Any]) -> str:
    """The mean over test problems, as the report has it; nothing where none was tested."""
    return f", test loss {fmean(found['test_losses']):.4f}" if "test_losses" in found else ""


def _remaining(session: _Session) -> str:
    if session.left <= 0:
        return "all done"
    minutes = session.left * session.seconds / session.steps / 60
    return f"about {minutes / 60:.1f} h left" if minutes >= 90 else f"about {math.ceil(minutes)} min left"
