"""A run's directory: what lies where, whether it may be written, and what a stopped run left in it.

RUN/                 the LoRA for the untouched base (method full: the model), with its card, tokenizer, pissa.json
RUN/residual/        only where it is quantised: what RUN/'s adapter, of rank r, is for
RUN/results.json     settings, losses by step, speed, versions, hardware
RUN/state/           what continues the run:
    run.json             settings, fingerprints of base and data, figures of the split
    log.jsonl            one line a step
    checkpoint-N/        adapter (as RUN/'s itself is), optimizer, schedule, generators
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint.disk.write import TEMPORARY_PREFIX, explained, locked, write_json
from ..checkpoint.factors import CONFIG
from ..errors import OutputError
from .recipe import Recipe


@dataclass(frozen=True)
class RunDirectory:
    """The places inside one run's directory."""

    path: Path
    """RUN."""

    @property
    def state(self) -> Path:
        """What continues the run."""
        return self.path / "state"

    @property
    def residual(self) -> Path:
        """The quantised residual, where the run has one."""
        return self.path / "residual"

    @property
    def record(self) -> Path:
        """The run's settings and what they were applied to."""
        return self.state / "run.json"

    @property
    def log(self) -> Path:
        """One JSON line a step."""
        return self.state / "log.jsonl"

    @property
    def results(self) -> Path:
        """There when the run is finished."""
        return self.path / "results.json"

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint from which the run continues; None for one that has none yet."""
        last = get_last_checkpoint(str(self.state)) if self.state.is_dir() else None
        return Path(last) if last is not None else None

    @property
    def what_is_saved(self) -> str:
        """One line for whoever interrupted the run."""
        last = self.last_checkpoint
        if last is None:
            return "interrupted before the first checkpoint: nothing is saved; the same command starts again"
        return f"interrupted; {last} is saved: the same command continues from there"


def absolute(model: str) -> str:
    """A model's directory such that it is found from everywhere; a hub id as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else str(model)


def has_only_other_settings(directory: RunDirectory, settings: dict[str, Any]) -> bool:
    """Whether all that a directory holds of a run is its record, with other settings: no checkpoint, no result."""
    if not directory.record.is_file() or directory.last_checkpoint is not None or directory.results.exists():
        return False
    return bool(_changes(settings, read_record(directory)["settings"]))


def discard(directory: RunDirectory) -> None:
    """Take away the record of a run that has no checkpoint, and what belongs to it; the record last."""
    for place in (directory.residual, directory.state / "runs"):
        if place.is_dir():
            shutil.rmtree(place)
    directory.log.unlink(missing_ok=True)
    directory.record.unlink(missing_ok=True)


def finished_results(directory: RunDirectory, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run that is finished; None for one to start or continue. Nothing is written.

    Raises:
        OutputError: the directory holds something that is not this run, or cannot be written.
    """
    if directory.record.is_file():
        before = read_record(directory)["settings"]
        _check_same_settings(directory.path, settings, before)
        if directory.results.is_file() and (directory.path / last_file(settings["method"])).is_file():
            return _read_results(directory)
    else:
        places = [place for place in (directory.path, directory.state) if place.is_dir()]
        if any(child != directory.state for place in places for child in _lasting(place)):
            raise OutputError(
                f"{directory.path} already holds something that is not a run; name a new directory, or remove it"
            )
    _check_writable(directory.path)
    return None


def _read_results(directory: RunDirectory) -> dict[str, Any]:
    try:
        results = json.loads(directory.results.read_text(encoding="utf-8"))
        return {**results, "losses": list(results["losses"])}
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{directory.results} is empty or damaged, although {directory.path} is finished; remove it, and the "
            "same command writes it again from the last checkpoint"
        ) from error


def last_file(method: str) -> str:
    """The file of a result that is written last: where it is, all are."""
    return "config.json" if method == "full" else CONFIG


def check_same_inputs(directory: RunDirectory, fingerprints: dict[str, str]) -> None:
    """Refuse to continue a run with another base or other data under the same names.

    Raises:
        OutputError: naming what changed.
    """
    if not directory.record.is_file():
        return
    record = read_record(directory)
    changed = [what for what, mark in fingerprints.items() if record["fingerprints"].get(what) not in (None, mark)]
    if changed:
        names = {
            "base": f"the weights of {record['settings']['model']}",
            "residual": f"the weights in {directory.residual}",
            "data": f"the rows of {_data_name(record)}",
        }
        raise OutputError(
            f"{' and '.join(names[what] for what in changed)} are not those that {directory.path} was started with; "
            "continue with what it was started with, or start in another directory"
        )


def read_record(directory: RunDirectory) -> dict[str, Any]:
    """What `run.json` holds: settings, fingerprints, split.

    Raises:
        OutputError: it is not one of ours.
    """
    try:
        record = json.loads(directory.record.read_text(encoding="utf-8"))
        return {
            "split": {},
            **record,
            "settings": dict(record["settings"]),
            "fingerprints": dict(record["fingerprints"]),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{directory.record} is not a run's record, so {directory.path} cannot be continued; "
            "name a new directory, or remove it"
        ) from error


@contextmanager
def only_writer(directory: RunDirectory) -> Iterator[None]:
    """Make the directory's state for this process alone, and take away what a killed one left half-written.

    Raises:
        OutputError: another process is training into it, or it cannot be written.
    """
    with explained(directory.path):
        directory.state.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory.state, os.O_RDONLY)
    try:
        if not locked(descriptor):
            raise OutputError(
                f"another process is training into {directory.path}; wait for it, or name another directory"
            )
        for leftover in leftovers(directory):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def leftovers(directory: RunDirectory) -> list[Path]:
    """What a killed process left half-written."""
    return [left for place in (directory.path, directory.state) for left in place.glob(f"{TEMPORARY_PREFIX}*")]


def write_record(directory: RunDirectory, record: dict[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    write_json(directory.record, record)


def _check_writable(out: Path) -> None:
    """Refuse a file, and a place where nothing can be made, before the work and not after it."""
    places = (out.absolute(), *out.absolute().parents)
    nearest = next(place for place in places if place.exists() or place.is_symlink())
    if not nearest.is_dir():
        raise OutputError(f"{nearest} is a file; name a directory for the run")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission in {nearest}; choose another directory")


def _lasting(place: Path) -> Iterator[Path]:
    """What a directory holds besides what a killed process left half-written."""
    return (child for child in place.iterdir() if not child.name.startswith(TEMPORARY_PREFIX))


def _check_same_settings(out: Path, now: dict[str, Any], before: dict[str, Any]) -> None:
    changed = _changes(now, before)
    if changed:
        raise OutputError(
            f"{out} is another run ({'; '.join(changed)}); give the same settings to continue it, or another directory"
        )


def _changes(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What differs between two runs' settings, for people."""
    now = json.loads(json.dumps(now))
    # a run that was started before a setting existed had its default
    before = {**json.loads(json.dumps(Recipe().as_dict())), **before}
    before["model"] = absolute(str(before.get("model")))
    return [
        f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in {**before, **now} if before.get(k) != now.get(k)
    ]


def _data_name(record: dict[str, Any]) -> str:
    return str(record["settings"]["data"])
