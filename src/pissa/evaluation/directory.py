"""An evaluation's directory, which only the very same evaluation goes on in.

OUT/eval.json       settings, and what model and data were
OUT/samples.jsonl   one line a sample, as they are made; in the problems' order once all are there
OUT/results.json    the figures; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.disk.resumable import Resumable, as_recorded
from ..checkpoint.disk.write import TEMPORARY_PREFIX, explained, write_json
from ..errors import OutputError
from ..outside.documents import read_document
from .samples import SampleLog

RECORD, SAMPLES, RESULTS = "eval.json", "samples.jsonl", "results.json"


@dataclass(frozen=True)
class EvaluationRecord:
    """What eval.json holds."""

    settings: dict[str, Any]
    """The model, the task, the data and the options."""
    fingerprints: dict[str, str]
    """What tells the model and the files from others of the same name."""


@dataclass(frozen=True)
class EvaluationResults:
    """What whoever finds a finished evaluation relies on in results.json."""

    task: str
    value: float
    settings: dict[str, Any]


@contextmanager
def evaluation_directory(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The directory, made if need be, for this process alone.

    Raises:
        OutputError: it holds something else or another evaluation, another process is at it, or it cannot be written.
    """
    resumable = _resumable(out)

    def check() -> None:
        record = resumable.read()
        if record is not None:
            resumable.check_same(record["settings"], as_recorded(settings))

    check()  # a directory that is somebody else's is not even locked
    with resumable.held(check):
        yield out


def begin(out: Path, settings: dict[str, Any], fingerprints: dict[str, str]) -> SampleLog:
    """Write what the evaluation is, or check that it is what was begun; the samples that are there already.

    Raises:
        OutputError: model or data are not what they were.
    """
    record = _resumable(out).read()
    if record is None:
        write_json(out / RECORD, {"settings": settings, "fingerprints": fingerprints})
    elif record["fingerprints"] != fingerprints:
        before = record["fingerprints"]
        changed = [key for key in {**before, **fingerprints} if before.get(key) != fingerprints.get(key)]
        raise OutputError(
            f"{' and '.join(changed)} changed since the evaluation in {out} was begun; name another directory"
        )
    return SampleLog(out / SAMPLES)


def finish(out: Path, samples: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Put the samples in order, and write the results."""
    partial = out / f"{TEMPORARY_PREFIX}{SAMPLES}"
    with explained(out):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out / SAMPLES)
    write_json(out / RESULTS, results)


def finished(out: Path) -> dict[str, Any] | None:
    """The results of an evaluation that is done; None of one that is not.

    Raises:
        OutputError: they are damaged.
    """
    path = out / RESULTS
    if not path.is_file():
        return None
    return read_document(
        path, EvaluationResults, error=OutputError, remedy="remove it, and the same command writes it again"
    )


def _resumable(out: Path) -> Resumable:
    return Resumable(out, out / RECORD, "evaluation", "evaluating", EvaluationRecord)
