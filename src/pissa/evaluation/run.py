"""`evaluate`: one model, one task, one figure with its interval, and every sample kept."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..checkpoint.recorded import recorded_template
from ..data.prompts import resolve_template
from ..errors import CheckpointError, DataError, Interrupted
from ..provenance import fingerprint, hardware, package_versions, sha256_of_file
from ..stages import stage
from ..training.bar import make_progress
from ..training.directory import absolute
from ..training.run import quieten
from .directory import SAMPLES, begin, evaluation_directory, finish, finished
from .load import Subject, load_subject
from .samples import SampleLog
from .task import Evaluation, EvaluationOptions, Task
from .tasks.registry import find_task


def evaluate(
    model: str,
    task: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: EvaluationOptions | None = None,
    *,
    base: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a task; an evaluation that stopped goes on where it was, to the same results.

    Args:
        model: a model's directory or hub id, a run, a checkpoint inside one, an export, or what `pissa init` wrote.
        task: a name that `find_task` knows.
        data: the local file that holds the problems.
        out: directory for samples and results; None keeps nothing.
        options: how to run; without a template, that of the run, else the task's own.
        base: of an adapter that does not record it.
        progress: a bar to use; None for one of its own.

    Returns:
        What results.json holds: task, metric, value, interval, count, others, notes, settings, versions, hardware.

    Raises:
        PissaError: the input or the settings are wrong.
        Interrupted: Ctrl-C; what was done is kept.

    Example:
        >>> from pissa import EvaluationOptions, evaluate
        >>> options = EvaluationOptions(limit=2, max_new_tokens=8)
        >>> found = evaluate("base", "gsm8k", "problems.jsonl", options=options)
        >>> found["metric"], found["count"]
        ('exact_match', 2)
    """
    quieten()
    options = options or EvaluationOptions()
    found = find_task(task)
    recorded = recorded_template(Path(model))
    usual = options.template is None and recorded is None and "template" in found.settings
    options = replace(options, template=options.template or recorded or found.template)
    found.check(options)
    problems = found.load(Path(data), options.limit)
    settings = {"model": absolute(model), "base": base, "task": task, "data": str(Path(data).absolute())}
    settings |= {name: value for name, value in asdict(options).items() if name in ("limit", *found.settings)}
    bar = progress or make_progress()
    with nullcontext() if progress is not None else bar:
        for warning in found.warnings():
            bar.console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        if out is None:
            subject = load_subject(model, base, classes=found.classes)
            marks = _marks(subject, data, options)
            made = _run(found, subject, problems, options, SampleLog(), bar, usual)
            return _results(found, made, settings, marks)
        with evaluation_directory(Path(out), settings) as directory:
            results = finished(directory)
            subject = load_subject(model, base, classes=found.classes)
            marks = _marks(subject, data, options)
            log = begin(directory, settings, marks)
            if results is not None:
                bar.console.print(f"{out} is finished already; these are its results", markup=False)
                return results
            if len(log):
                bar.console.print(f"going on after {len(log)} samples in {directory / SAMPLES}", markup=False)
            try:
                made = _run(found, subject, problems, options, log, bar, usual)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted; {len(log)} samples are in {directory / SAMPLES}: the same command goes on from there"
                ) from None
            results = _results(found, made, settings, marks)
            finish(directory, made.samples, results)
            return results


def _run(
    task: Task,
    subject: Subject,
    problems: list[Any],
    options: EvaluationOptions,
    log: SampleLog,
    bar: Progress,
    usual: bool,
) -> Evaluation:
    row = bar.add_task(task.name, total=None, note="")

    def advance(done: int, total: int) -> None:
        bar.update(row, completed=done, total=total)

    with stage(f"evaluating on {task.name}"):
        made = task.run(subject.model, subject.tokenizer, problems, options, log=log, progress=advance)
    if usual:
        template = resolve_template(options.template or task.template, subject.tokenizer)
        made = replace(made, notes=(*made.notes, f"prompts are in template {template!r}; --template changes it"))
    return made


def _results(task: Task, made: Evaluation, settings: dict[str, Any], marks: dict[str, str]) -> dict[str, Any]:
    if not math.isfinite(made.value):
        raise CheckpointError(
            f"{made.metric} of {settings['model']} is {made.value}: its outputs are not finite numbers, so its weights "
            "are damaged or diverged in training"
        )
    return {
        "task": task.name,
        "metric": made.metric,
        "value": made.value,
        "interval": list(made.interval) if made.interval is not None else None,
        "count": len(made.samples),
        "higher_is_better": made.higher_is_better,
        "others": made.others,
        "notes": list(made.notes),
        "settings": settings,
        "fingerprints": marks,
        "versions": package_versions(),
        "hardware": hardware(),
    }


def _marks(subject: Subject, data: str | os.PathLike[str], options: EvaluationOptions) -> dict[str, str]:
    """What tells the model and the files from others of the same name."""
    files = {"data": data, "references": options.references, "judge_prompts": options.judge_prompts}
    digests = {name: _digest(Path(path)) for name, path in files.items() if path is not None}
    return {"model": fingerprint(subject.model), **digests}


def _digest(path: Path) -> str:
    try:
        return sha256_of_file(path)[:16]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
