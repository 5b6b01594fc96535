"""What a source's name says before anything is read: a path that is there, one that is not, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names."""
OLD_ADAPTER_WEIGHTS = "adapter_model.bin"
"""What PEFT wrote before it wrote safetensors."""
INITIAL = "pissa_init"
"""Where the adapter at step 0 lies, below a residual or a run."""
INITIALS = (INITIAL, "corda_init", "loftq_init")
"""The same of residuals that others publish: by the scripts of PiSSA, of CorDA, and of LoftQ, whose are quantised."""


def initial_in(directory: Path) -> Path | None:
    """The directory of the adapter at step 0, below that of a residual or a run; None where there is none."""
    return next((place for name in INITIALS if ((place := directory / name) / ADAPTER_CONFIG).is_file()), None)


def looks_like_path(source: str | os.PathLike[str]) -> bool:
    """Whether a source can only be a path: hub ids are `name` or `org/name`."""
    text = os.fspath(source)
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")


def check_model_name(model: str | os.PathLike[str]) -> None:
    """Refuse a file, and a path where nothing is; a directory and a hub id pass.

    Raises:
        CheckpointError: with what to give.
    """
    path = Path(model)
    if not os.fspath(model):
        raise CheckpointError("the model's name is empty; give a model's directory or a hub id such as org/name")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json and the weights")
    if not path.exists() and looks_like_path(model):
        raise CheckpointError(f"{model} does not exist; give a model's directory or a hub id such as org/name")


def check_adapter_name(adapter: str | os.PathLike[str]) -> None:
    """Refuse a file, and a path where nothing is; a directory and a hub id pass.

    Raises:
        CheckpointError: with what to give.
    """
    path = Path(adapter)
    if not path.is_dir() and (path.exists() or looks_like_path(adapter)):
        raise CheckpointError(f"{adapter} is not a directory; give a run, a PEFT adapter directory, or a hub id")
