"""An evaluation's directory, which only the very same evaluation goes on in.

OUT/eval.json       settings, and what model and data were
OUT/samples.jsonl   one line a sample, as they are made; in the problems' order once all are there
OUT/results.json    the figures; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checkpoint.disk.write import TEMPORARY_PREFIX, explained, locked, write_json
from ..errors import OutputError
from .samples import SampleLog

RECORD, SAMPLES, RESULTS = "eval.json", "samples.jsonl", "results.json"


@contextmanager
def evaluation_directory(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The directory, made if need be, for this process alone.

    Raises:
        OutputError: it holds something else or another evaluation, another process is at it, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory for the evaluation")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not locked(descriptor):
            raise OutputError(f"another process is evaluating into {out}; wait for it, or name another directory")
        record = _record(out)
        if record is not None:
            _check_same(out, "settings", settings, record["settings"])
        elif any(not child.name.startswith(TEMPORARY_PREFIX) for child in out.iterdir()):
            raise OutputError(f"{out} already holds something that is not an evaluation; name a new directory")
        yield out
    finally:
        os.close(descriptor)
        with suppress(OSError):
            out.rmdir()  # only where nothing came of it: a directory that holds something stays


def begin(out: Path, settings: dict[str, Any], fingerprints: dict[str, str]) -> SampleLog:
    """Write what the evaluation is, or check that it is what was begun; the samples that are there already.

    Raises:
        OutputError: model or data are not what they were.
    """
    record = _record(out)
    if record is None:
        write_json(out / RECORD, {"settings": settings, "fingerprints": fingerprints})
    else:
        _check_same(out, "fingerprints", fingerprints, record["fingerprints"])
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
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged; remove it, and the same command writes it again") from error


def _record(out: Path) -> dict[str, Any] | None:
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "fingerprints": dict(record["fingerprints"])}
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{path} is not an evaluation's record; name a new directory, or remove it") from error


def _check_same(out: Path, what: str, now: dict[str, Any], before: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not changed:
        return
    if what == "fingerprints":
        raise OutputError(
            f"{' and '.join(changed)} changed since the evaluation in {out} was begun; name another directory"
        )
    listed = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
    raise OutputError(f"{out} is another evaluation ({listed}); give the same settings, or name another directory")
