"""What a directory or a hub id holds, as far as names of files and one small JSON file tell: a moment, without torch.

Commands look here first, so that a wrong path is said at once. The readers look again, and at the bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...outside.hub import at_the_hub, not_found
from ...stages import stage
from ..manifest import MANIFEST, read_manifest
from .files import CONFIG, find_weights, read_json
from .hub import in_cache
from .names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OLD_ADAPTER_WEIGHTS,
    check_adapter_name,
    check_model_name,
    initial_in,
)

PATIENCE = 10.0
"""Seconds that the hub has for an answer."""


def check_model(model: str | os.PathLike[str]) -> None:
    """Refuse what is no model: a directory without configuration or weights, an adapter, an id that the hub has not.

    Raises:
        CheckpointError: with what to give.
    """
    check_model_name(model)
    directory = Path(model)
    if not directory.is_dir():
        _check_in_hub(os.fspath(model), CONFIG)
        return
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file():
        raise CheckpointError(f"{model} holds an adapter ({ADAPTER_CONFIG}) and no model; give its base")
    if find_weights(directory).form != "gguf":
        config_in(directory)


def config_in(directory: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not os.path.lexists(directory / CONFIG):
        raise CheckpointError(f"{directory} has no {CONFIG}; a model directory holds {CONFIG} and its weights")
    return read_json(directory / CONFIG)


def check_adapter(adapter: str | os.PathLike[str]) -> None:
    """Refuse what is no adapter: a directory without one, an id that the hub has not.

    Raises:
        CheckpointError: with what to give.
    """
    check_adapter_name(adapter)
    directory = Path(adapter)
    if not directory.is_dir():
        _check_in_hub(os.fspath(adapter), ADAPTER_CONFIG)
        return
    trained = (read_manifest(directory) or {}).get("trained")
    if trained or initial_in(directory) is not None:
        return
    if not (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(no_adapter_in(directory))
    if not any((directory / name).is_file() for name in (ADAPTER_WEIGHTS, OLD_ADAPTER_WEIGHTS)):
        raise CheckpointError(f"{directory} has no {ADAPTER_WEIGHTS}; the adapter is incomplete")


def check_subject(subject: str | os.PathLike[str]) -> None:
    """Refuse what holds neither a model nor an adapter, and an id that the hub has not.

    Raises:
        CheckpointError: with what to give.
    """
    directory = Path(subject)
    if not directory.is_dir():
        check_model_name(subject)
        _check_in_hub(os.fspath(subject), CONFIG, ADAPTER_CONFIG)
    elif (directory / ADAPTER_CONFIG).is_file():
        check_adapter(subject)
    elif (directory / CONFIG).is_file():
        check_model(subject)
    elif initial_in(directory) is None:
        raise CheckpointError(nothing_in(directory))


def nothing_in(directory: Path) -> str:
    """What to say of a directory with neither a model nor an adapter."""
    if (directory / "state").is_dir():
        return (
            f"{directory} is a run that has not finished; finish it, or give one of its checkpoints in "
            f"{directory / 'state'}"
        )
    manifest = read_manifest(directory)
    kind = f" (its {MANIFEST} says {manifest['layout']!r})" if manifest and "layout" in manifest else ""
    return (
        f"{directory} holds neither a model ({CONFIG}) nor an adapter ({ADAPTER_CONFIG}){kind}; give one of them, or a "
        "run"
    )


def no_adapter_in(directory: Path) -> str:
    """What to say of a directory without an adapter where one is wanted."""
    whole = " (it is a whole model)" if (directory / CONFIG).is_file() else ""
    return f"{directory} has no {ADAPTER_CONFIG}{whole}; give a finished run or a PEFT adapter directory"


def _check_in_hub(name: str, *files: str) -> None:
    """Refuse an id of which the cache has none of these files and that the hub does not have, or cannot be asked for.
    One question, without the repetitions of a download."""
    from huggingface_hub import HfApi

    try:
        if all(in_cache(name, file) is None for file in files):
            with at_the_hub(), stage(f"asking the hub for {name}"):
                HfApi().repo_info(name, timeout=PATIENCE)
    except Exception as error:  # of the hub's, of the network's, of the system's
        raise CheckpointError(not_found(name, error)) from error
