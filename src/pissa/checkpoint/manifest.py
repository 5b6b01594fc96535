"""`pissa.json`: what a directory of ours holds and how it came about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MANIFEST = "pissa.json"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The directory's manifest; None where there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore it from the run that wrote it") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds {type(document).__name__} instead of an object; restore it")
    return document
