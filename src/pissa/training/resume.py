"""Going on from a checkpoint that is not the run's last one, and training a finished run longer.

    --resume-from RUN/state/checkpoint-N, of the run itself     later checkpoints are removed
    --resume-from OTHER, or a checkpoint of it                  the checkpoint is copied; OTHER stays as it is
    --max-steps, or --epochs, raised                            the run goes on from its last checkpoint

A schedule that falls is one of the whole run: longer, it is another one, and a run that is continued so has come down
once before. With a constant rate the run is the longer one, up to the length of its warm-up.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..checkpoint.disk.write import TEMPORARY_PREFIX, durable_rename, write_json
from ..errors import ConfigError, OutputError
from ..outside.documents import Unreadable, parse_object
from .checkpoints import check_checkpoint, checkpoints, step_of
from .directory import LENGTH, RunDirectory, as_one_length, read_record
from .progress import keep_up_to
from .validation import ValidationRecord

ELSEWHERE = ("report_to",)
"""What a run that goes on from another one's checkpoint may have otherwise, beside its length."""


def go_back(directory: RunDirectory, resume_from: str, settings: dict[str, Any]) -> None:
    """Let a run go on from a checkpoint; nothing is done where it has been before.

    Args:
        directory: of the run.
        resume_from: a checkpoint, or a run's directory for its last one.
        settings: of the run.

    Raises:
        ConfigError: there is no such checkpoint, or it is one of a run with other settings.
        OutputError: it is damaged, or the run's directory holds something else.
    """
    source, checkpoint = _named(resume_from)
    mark = f"{source.path.absolute()}, step {step_of(checkpoint)}"
    record = directory.resumable.read()
    if record is not None and record.get("resumed_from") == mark and directory.last_checkpoint is not None:
        return
    check_checkpoint(source, checkpoint)
    own = source.path.absolute() == directory.path.absolute()
    if not own:
        _check_like(source, directory, settings)
    with directory.resumable.held():
        if own:
            _go_back_to(directory, checkpoint, mark)
        else:
            _copy(source, checkpoint, directory, settings, mark)


def _named(resume_from: str) -> tuple[RunDirectory, Path]:
    """The run and its checkpoint that somebody means."""
    place = Path(resume_from)
    of_run = RunDirectory(place)
    if of_run.record.is_file() and of_run.last_checkpoint is not None:
        return of_run, of_run.last_checkpoint
    run = RunDirectory(place.absolute().parent.parent)
    if not place.is_dir() or step_of(place) is None or not run.record.is_file():
        raise ConfigError(
            f"resume_from is {resume_from}, which is neither a run with a checkpoint nor a checkpoint of a run; give "
            "RUN or RUN/state/checkpoint-N"
        )
    return run, run.state / place.name


def _go_back_to(directory: RunDirectory, checkpoint: Path, mark: str) -> None:
    write_json(directory.record, {**read_record(directory), "resumed_from": mark})
    directory.results.unlink(missing_ok=True)
    for later in checkpoints(directory):
        if (step_of(later) or 0) > (step_of(checkpoint) or 0):
            shutil.rmtree(later)


def _check_like(source: RunDirectory, directory: RunDirectory, settings: dict[str, Any]) -> None:
    """Refuse another run whose checkpoint would not continue in this one."""
    if directory.last_checkpoint is not None:
        raise OutputError(
            f"{directory.path} has checkpoints of its own; leave resume_from out to continue it, or name another "
            "directory"
        )
    if source.residual.is_dir():
        raise ConfigError(f"{source.path} is for its own quantised residual; continue it in its own directory")
    before, now = as_one_length(read_record(source)["settings"], settings)
    free = {name: now.get(name) for name in ELSEWHERE}
    source.resumable.check_same({**before, **free}, now, "the settings of that run")


def _copy(source: RunDirectory, checkpoint: Path, directory: RunDirectory, settings: dict[str, Any], mark: str) -> None:
    record = read_record(source)
    step = step_of(checkpoint) or 0
    write_json(directory.record, {**record, "settings": settings, "resumed_from": mark})
    for log, copy in ((source.log, directory.log), (source.validation, directory.validation)):
        if log.is_file():
            shutil.copyfile(log, copy)
    keep_up_to(directory.log, step)
    if directory.validation.is_file():
        keep_up_to(directory.validation, step, ValidationRecord)
    best = source.state / f"checkpoint-{_best_step(checkpoint)}"
    for each in (best, checkpoint):
        if each.is_dir() and not (directory.state / each.name).exists():
            partial = directory.state / f"{TEMPORARY_PREFIX}{each.name}"
            shutil.copytree(each, partial)
            durable_rename(partial, directory.state / each.name)


def _best_step(checkpoint: Path) -> int | None:
    try:
        return parse_object((checkpoint / "trainer_state.json").read_bytes()).get("best_global_step")
    except (OSError, Unreadable):
        return None


def longer(directory: RunDirectory, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is to be said, and recorded, of a run that goes on beyond the length that it had; None where it does not.

    Args:
        directory: of the run.
        settings: what is asked for.
    """
    if not directory.record.is_file() or (checkpoint := directory.last_checkpoint) is None:
        return None
    before = read_record(directory)["settings"]
    changed = {name: before.get(name) for name in LENGTH if before.get(name) != settings[name]}
    return {"step": step_of(checkpoint), **changed} if changed else None


def what_follows(schedule: str) -> str:
    """What training a run longer means for its learning rate."""
    if schedule == "constant":
        return "the rate is constant, so that this is the longer run, up to the length of its warm-up"
    return (
        f"its {schedule} schedule becomes that of the longer run, so the rate goes up again from where it had come "
        "down; a run of this length from the start would have come down once"
    )
