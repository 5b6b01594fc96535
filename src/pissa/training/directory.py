"""A run's directory: what lies where, whether it may be written, and what a stopped run left in it.

RUN/                 the LoRA for the untouched base (method full: the model), with its card, tokenizer, pissa.json
RUN/residual/        only where it is quantised: what RUN/'s adapter, of rank r, is for
RUN/results.json     settings, losses by step, speed, versions, hardware
RUN/state/           what continues the run:
    run.json             settings, fingerprints of base and data, figures of the split
    log.jsonl            one line a step
    validation.jsonl     one line for each time that the validation loss was measured
    polish.safetensors   only while the start is polished: how far that is
    checkpoint-N/        adapter (as RUN/'s itself is), optimizer, schedule, generators
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint.disk.resumable import Resumable, as_recorded
from ..checkpoint.disk.write import check_writable, write_json
from ..checkpoint.factors import CONFIG
from ..errors import OutputError
from ..outside.documents import read_document
from .recipe import Recipe

LENGTH = ("max_steps", "epochs")
"""Settings that say how long a run is."""


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds."""

    settings: dict[str, Any]
    """The model, the data and the recipe."""
    fingerprints: dict[str, str]
    """What tells the base's weights and the data from others of the same name."""
    split: dict[str, float | None] = field(default_factory=dict)
    """Figures of the split."""
    advice: dict[str, Any] | None = None
    """The learning rate that was estimated, and what it rests on."""
    resumed_from: str | None = None
    """The checkpoint from which the run was made to go on."""
    continued: list[dict[str, Any]] = field(default_factory=list)
    """Each time that it was trained longer: the step, and the length that it had had."""


@dataclass(frozen=True)
class RunResults:
    """What whoever finds a finished run relies on in `results.json`."""

    losses: list[float]
    """By step."""
    settings: dict[str, Any]


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
    def validation(self) -> Path:
        """One JSON line for each time that the validation loss was measured."""
        return self.state / "validation.jsonl"

    @property
    def polish(self) -> Path:
        """How far the start has been polished; there only until it is."""
        return self.state / "polish.safetensors"

    @property
    def results(self) -> Path:
        """There when the run is finished."""
        return self.path / "results.json"

    @property
    def resumable(self) -> Resumable:
        """The directory as one that only this run may continue."""
        return Resumable(self.path, self.record, "run", "training", RunRecord, self.state)

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint from which the run continues; None for one that has none yet."""
        last = get_last_checkpoint(str(self.state)) if self.state.is_dir() else None
        return Path(last) if last is not None else None

    @property
    def what_is_saved(self) -> str:
        """One line for whoever interrupted the run."""
        last = self.last_checkpoint
        if last is None and self.polish.is_file():
            return "interrupted while the start was polished: the same command goes on with that"
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
    before, now = _comparable(settings, read_record(directory)["settings"])
    return before != now


def discard(directory: RunDirectory) -> None:
    """Take away the record of a run that has no checkpoint, and what belongs to it; the record last."""
    for place in (directory.residual, directory.state / "runs"):
        if place.is_dir():
            shutil.rmtree(place)
    directory.log.unlink(missing_ok=True)
    directory.validation.unlink(missing_ok=True)
    directory.polish.unlink(missing_ok=True)
    directory.record.unlink(missing_ok=True)


def finished_results(directory: RunDirectory, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run that is finished; None for one to start or continue. Nothing is written.

    Raises:
        OutputError: the directory holds something that is not this run, or cannot be written.
    """
    record = directory.resumable.read()
    if record is not None:
        before, now = _comparable(settings, record["settings"])
        goes_on = directory.last_checkpoint is not None and _is_longer(before, now)
        if goes_on:
            before, now = as_one_length(record["settings"], settings)
        directory.resumable.check_same(before, now)
        if not goes_on and directory.results.is_file() and (directory.path / last_file(settings["method"])).is_file():
            results = _read_results(directory)
            # what was trained longer has the results of its former length until it is finished again
            if not any(results["settings"].get(name, now[name]) != now[name] for name in LENGTH):
                return results
    check_writable(directory.path)
    return None


def _is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether settings ask for more steps than a run had been meant to have."""
    (steps, epochs), (now_steps, now_epochs) = ((each["max_steps"], each["epochs"]) for each in (before, now))
    if now_steps is None:
        return steps is None and now_epochs > epochs
    return epochs == now_epochs and (steps is None or now_steps > steps)


def as_one_length(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recorded, new) settings of two runs, whose lengths do not count as a difference."""
    before, now = _comparable(now, before)
    return {**before, **{name: now[name] for name in LENGTH}}, now


def _read_results(directory: RunDirectory) -> dict[str, Any]:
    remedy = (
        f"{directory.path} is finished, so its results are damaged: remove them, and the same command writes them "
        "again from the last checkpoint"
    )
    return read_document(directory.results, RunResults, error=OutputError, remedy=remedy)


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
            "data": f"the rows of {record['settings']['data']}",
            "eval_data": f"the rows of {record['settings'].get('eval_data')}",
        }
        raise OutputError(
            f"{' and '.join(names[what] for what in changed)} are not those that {directory.path} was started with; "
            "continue with what it was started with, or start in another directory"
        )


def read_record(directory: RunDirectory) -> dict[str, Any]:
    """What `run.json` holds: settings, fingerprints, split.

    Raises:
        OutputError: it is not one of ours, or missing.
    """
    record = directory.resumable.read()
    if record is None:
        raise OutputError(f"{directory.path} holds no run; start it again")
    return {"split": {}, **record}


@contextmanager
def only_writer(
    directory: RunDirectory, settings: dict[str, Any] | None = None, checkpoint: Path | None = None
) -> Iterator[None]:
    """Make the directory's state for this process alone, and take away what a killed one left half-written.

    Args:
        directory: of the run.
        settings: what the run is about to do. Under the lock it is decided again whether the directory is free for it,
            so that nothing that another process did meanwhile is replaced.
        checkpoint: from which the run is about to continue.

    Raises:
        OutputError: another process is training into it, or has trained there meanwhile, or it cannot be written.
    """

    def check() -> None:
        if settings is None:
            return
        if finished_results(directory, settings) is not None or directory.last_checkpoint != checkpoint:
            raise OutputError(
                f"another process trained into {directory.path} while this run was being prepared; the same command "
                "continues from what is there now"
            )

    with directory.resumable.held(check):
        yield


def leftovers(directory: RunDirectory) -> list[Path]:
    """What a killed process left half-written."""
    return directory.resumable.leftovers()


def write_record(directory: RunDirectory, record: dict[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    write_json(directory.record, record)


def _comparable(now: dict[str, Any], before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recorded, new) settings of two runs; a run that was started before a setting existed had its default."""
    before = {**as_recorded(Recipe().as_dict()), **before}
    before["model"] = absolute(str(before.get("model")))
    before.pop("resume_from", None)
    return before, as_recorded(now)
