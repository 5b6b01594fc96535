"""GLUE: its tasks as they come in files, and the metrics by which each is scored (arXiv 1804.07461).

A task's directory holds train.tsv.gz and dev.tsv.gz (or the same without .gz) as GLUE publishes them. Its test labels
are not public, so scores are those of the development set.

    accuracy           share of right classes                SST-2, MRPC, QNLI, RTE, MNLI, QQP
    F1                 of the positive class                 MRPC, QQP
    Matthews           correlation of two classes            CoLA
    Pearson, Spearman  correlation of values, of their ranks STS-B
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    name: str
    """As GLUE calls it; also its directory."""
    texts: tuple[str, ...]
    """Columns of one or two texts."""
    label: str
    """Column of the label."""
    classes: int
    """How many; 1 for a value to regress."""
    metrics: tuple[str, ...]
    """GLUE's, the one that the PiSSA paper shows first."""
    most: float = 1.0
    """Of a regressed value."""


GLUE = {
    task.name: task
    for task in (
        GlueTask("SST-2", ("sentence",), "label", 2, ("accuracy",)),
        GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", 2, ("accuracy", "f1")),
        GlueTask("STS-B", ("sentence1", "sentence2"), "score", 1, ("pearson", "spearman"), most=5.0),
    )
}


@dataclass(frozen=True)
class GlueRow:
    """One example."""

    texts: tuple[str, ...]
    """One text or two."""
    label: float
    """The class, or the value as it stands in the file."""


def read_glue(task: GlueTask, directory: Path, split: str = "train") -> list[GlueRow]:
    """The rows of a task.

    Args:
        task: which one.
        directory: the folder that holds the task's own, such as MRPC/.
        split: "train" or "dev".

    Raises:
        DataError: a file or a column is missing, or a label is none of the task's.
    """
    plain = directory / task.name / f"{split}.tsv"
    path = plain if plain.is_file() else plain.with_name(f"{split}.tsv.gz")
    opened = open if path == plain else gzip.open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns = (*task.texts, task.label)
    missing = [name for name in columns if not found or name not in found[0]]
    if missing:
        raise DataError(
            f"{path} has no rows with {', '.join(missing)}; GLUE's own {split} file of {task.name} is needed"
        )
    rows = []
    for number, row in enumerate(found, 2):
        if any(row[name] is None for name in columns):
            raise DataError(f"{path}:{number} ends before its last column")
        rows.append(GlueRow(tuple(row[name] for name in task.texts), _label(task, row[task.label], f"{path}:{number}")))
    return rows


def score(task: GlueTask, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """The task's metrics.

    Args:
        task: which one.
        predictions: classes, or values.
        labels: as many.
    """
    return {name: METRICS[name](predictions, labels) for name in task.metrics}


def accuracy(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Share of the predictions that are right."""
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def f1(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""
    both = sum(p == 1 and y == 1 for p, y in zip(predictions, labels, strict=True))
    total = sum(p == 1 for p in predictions) + sum(y == 1 for y in labels)
    return 2 * both / total if total else 0.0


def matthews(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Matthews correlation of two classes: Pearson's of zeros and ones."""
    return pearson(predictions, labels)


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; 0 where one side is constant."""
    n = len(labels)
    mean_p, mean_y = math.fsum(predictions) / n, math.fsum(labels) / n
    p, y = [value - mean_p for value in predictions], [value - mean_y for value in labels]
    spread = math.sqrt(math.fsum(a * a for a in p) * math.fsum(b * b for b in y))
    return math.fsum(a * b for a, b in zip(p, y, strict=True)) / spread if spread else 0.0


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(labels))


METRICS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks


def _label(task: GlueTask, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    allowed = 0 <= value <= task.most if task.classes == 1 else value in range(task.classes)
    if not allowed:
        meant = f"0 to {task.most:g}" if task.classes == 1 else f"0 to {task.classes - 1}"
        raise DataError(f"{where} has label {text!r}; {task.name} has {meant}")
    return value
