"""`verify`: a directory is what its `pissa.json` says, to the byte; and residual + adapter are the base.

The manifest's digest has no key: whoever can change the files can write a manifest that fits them. So without a base
`verify` finds accidents (a cut download, a full disk, a forgotten file), and with one it finds everything that makes
the directory compute something else than the base, whoever made it (`against_base.py`). It does not prove who made it.

Files are read piece by piece and weights one at a time, so that a checkpoint of any size is verified in little memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, listed
from ...outside.documents import Unreadable, parse_object, read_bounded
from ...outside.schema import wrong_fields
from ..manifest import MANIFEST, Manifest
from ..seal import DIGEST, is_intact, is_unsealed_name
from ..source.reader import open_source
from .against_base import compare
from .sealed import Progress, Sealed


@dataclass(frozen=True)
class Verification:
    """A directory that is what it says."""

    path: Path
    files: int
    tensors: int
    size: int
    """Bytes of all files."""
    errors: dict[str, float]
    """Module -> `‖W − (residual + s·B·A)‖ / ‖W‖` against the base; empty where none was given."""


def verify(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Verification:
    """Check a directory of `init_checkpoint` or `save_residual` against its manifest, byte for byte.

    Args:
        path: the directory.
        base: the base's directory or hub id: everything in the directory is then held against what follows from the
            base and the settings of the split, and residual + adapter against its weights, within the error that the
            manifest states and its storage allows.
        progress: called with (what is being read, bytes read, bytes in all).

    Returns:
        What was counted, and how far residual + adapter are from the base's weights.

    Raises:
        CheckpointError: naming every file and tensor that is missing, changed, or should not be there.

    Example:
        >>> from pissa import PissaConfig, init_checkpoint, verify
        >>> made = init_checkpoint("base", "split", PissaConfig(rank=8))
        >>> found = verify("split", "base")
        >>> max(found.errors.values()) < 1e-6  # residual + adapter against the base, of each weight's norm
        True
    """
    path = Path(path)
    manifest = read_sealed(path)
    described: dict[str, Any] = manifest["files"]
    total = sum(file["size"] for file in described.values())
    problems = [f"{name} is not in {MANIFEST}: remove it" for name in _extra_files(path, described)]
    with ExitStack() as held:
        sealed = Sealed(path, progress, total)
        held.callback(sealed.close)
        for name, file in described.items():
            problems += sealed.check(name, file)
        if problems:
            raise CheckpointError(_summary(path, problems))
        errors: dict[str, float] = {}
        if base is not None:
            errors, problems = compare(manifest, sealed, held.enter_context(open_source(base)))
        if problems:
            raise CheckpointError(_summary(path, problems))
    return Verification(path, len(described) + 1, len(sealed.entries), total, errors)


def read_sealed(path: Path) -> dict[str, Any]:
    """A directory's manifest, once its own digest is right and its fields are what they should be.

    Raises:
        CheckpointError: there is none, it was changed, or it does not describe files.
    """
    place = path / MANIFEST
    try:
        text = read_bounded(place).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place} was changed: it is no text any more; make {path} again") from error
    except Unreadable as reason:
        raise CheckpointError(f"{path} has no {MANIFEST} that could be read; give what pissa init wrote") from reason
    if not is_intact(text):
        if DIGEST not in text and text.lstrip().startswith("{"):
            raise CheckpointError(
                f"{place} describes no files; only what pissa init and save_residual write can be verified"
            )
        raise CheckpointError(
            f"{place} was changed: its digest does not fit it, so that nothing can be held against it; make {path} "
            "again"
        )
    try:
        document = parse_object(text.encode())
    except Unreadable as reason:
        raise CheckpointError(f"{place} {reason}; make {path} again") from reason
    wrong = list(wrong_fields(document, Manifest))
    if wrong:
        raise CheckpointError(f"{place} is not one of ours: {listed(wrong, separator='; ')}; make {path} again")
    if not document.get("files"):
        raise CheckpointError(f"{place} names no files; only what pissa init and save_residual write can be verified")
    return document


def _extra_files(path: Path, described: Mapping[str, Any]) -> list[str]:
    """What lies in the directory and is not described: everything but hidden files, and the manifest itself."""
    found = []
    for directory, folders, names in os.walk(path):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        links = [folder for folder in folders if (Path(directory) / folder).is_symlink()]
        found += [(Path(directory) / name).relative_to(path).as_posix() for name in [*names, *links]]
    return sorted(name for name in found if name not in described and not is_unsealed_name(name))


def _summary(path: Path, problems: list[str]) -> str:
    return f"{path} is not what its {MANIFEST} says: {listed(problems, 50, '; ')}"
