"""Whether a run's checkpoint is whole: a run continues to the same losses from all of its parts, or not at all.

Trainer continues without a word where optimizer, schedule or generators are missing. So every checkpoint gets a list of
its files with their digests, `checkpoint.json`, as the last thing that is written into it, and a run continues only
from one that is as listed and whose steps are all in the log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..checkpoint.disk.write import explained, write_json
from ..checkpoint.manifest import PlainFileEntry, PlainPath
from ..checkpoint.seal import plain_file
from ..errors import OutputError, listed
from ..outside.documents import read_document
from .directory import RunDirectory
from .progress import read_log

LIST = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointList:
    """What `checkpoint.json` holds."""

    files: Annotated[dict[PlainPath, PlainFileEntry], len, "an object of at least one file"]
    """Every other file of the checkpoint."""


def list_files(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files beside them, last."""
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / LIST, {"files": {name: plain_file(checkpoint / name) for name in names if name != LIST}})


def check_checkpoint(directory: RunDirectory, checkpoint: Path | None) -> None:
    """Refuse to continue from a checkpoint that is not whole.

    Args:
        directory: of the run.
        checkpoint: its last one; None for a run that has none yet.

    Raises:
        OutputError: naming what is missing or damaged, and the last checkpoint from which the run can continue.
    """
    if checkpoint is None:
        return
    wrong = problems(directory, checkpoint)
    if not wrong:
        return
    others = (path for path in checkpoints(directory) if path != checkpoint)
    whole = next((path for path in others if not problems(directory, path)), None)
    remedy = (
        f"remove it, and whatever is later than {whole.name}, and the same command continues from {whole}"
        if whole is not None
        else "there is no whole checkpoint before it: start again in another directory"
    )
    raise OutputError(
        f"{checkpoint} is not whole, so the run cannot be continued from it: {listed(wrong, separator='; ')}; {remedy}"
    )


def checkpoints(directory: RunDirectory) -> list[Path]:
    """The run's checkpoints, the last one first."""
    found = [path for path in directory.state.glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def problems(directory: RunDirectory, checkpoint: Path) -> list[str]:
    """What is missing or damaged in a checkpoint, or in the log of its steps."""
    try:
        with explained(checkpoint):
            files = read_document(checkpoint / LIST, CheckpointList, error=OutputError)["files"]
            wrong = [problem for name, entry in files.items() if (problem := _problem(checkpoint, name, entry))]
    except OutputError as error:
        return [str(error).partition("; ")[0]]
    step = step_of(checkpoint) or 0
    logged = [record["step"] for record in read_log(directory.log)]
    missing = sorted(set(range(1, step + 1)) - set(logged))
    if missing:
        wrong.append(f"{directory.log} has no whole line of step {missing[0]}")
    return wrong


def _problem(checkpoint: Path, name: str, entry: dict[str, object]) -> str | None:
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["size"]:
        return f"{name} has {path.stat().st_size:,} bytes and not {entry['size']:,}"
    return None if plain_file(path) == entry else f"{name} was changed"


def step_of(checkpoint: Path) -> int | None:
    """The step after which a checkpoint was written; None for a directory of another name."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
