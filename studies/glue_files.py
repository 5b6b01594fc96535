"""GLUE as its files have it: tasks, rows, and by which metrics each task is scored (arXiv 1804.07461).

A task's directory holds train.tsv.gz and dev.tsv.gz (or the same without .gz) as GLUE publishes them. Its test labels
are not public, so scores are those of the development set.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pissa.errors import DataError
from pissa.evaluation.metrics import METRICS


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
    """The largest value, where values are regressed."""


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
