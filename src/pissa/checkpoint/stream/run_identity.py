"""What a run is: its command, its base and the versions of what computes. Only the very same one is continued.

A base is told by its configuration, its tensors' names, kinds and places, and its files' sizes, all of which cost
nothing to read. Where a file was touched since, what was made of it is held against it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import PissaConfig
from ...errors import CheckpointError, listed
from ...provenance import package_versions, sha256, sha256_of_document, sha256_of_file
from ..disk.layout import raw_bytes
from ..disk.resumable import as_recorded
from ..source.reader import Source
from .jobs import Job


def identity(
    source: str | os.PathLike[str],
    base: Source,
    config: PissaConfig,
    dtype: str | None,
    batches: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """All that has to be the same for a run to be continued, as JSON has it."""
    document = {
        "base": str(Path(source).absolute()) if Path(source).is_dir() else str(source),
        "config": asdict(config),
        "dtype": dtype,
        "base_files": describe_base(base),
        "versions": package_versions(),
    }
    if batches is not None:
        document["text"] = sha256(
            part
            for batch in batches
            for name, value in sorted(batch.items())
            for part in (f"{name} {tuple(value.shape)} ".encode(), raw_bytes(value.contiguous()))
        )
    return as_recorded(document)


def describe_base(source: Source) -> dict[str, Any]:
    """What tells one base from another without reading its weights."""
    files = sorted({entry.file for entry in source.entries.values()})
    entries = {n: [e.kind, list(e.shape), e.file.name, e.offset] for n, e in source.entries.items()}
    return {
        "sizes": {file.name: os.stat(file).st_size for file in files},
        "config": sha256_of_document(source.config),
        "tensors": sha256_of_document(entries),
        "others": {file.name: sha256_of_file(file) for file in source.others},
    }


def modification_times(source: Source) -> dict[str, int]:
    """The base's files -> when each was changed last, in nanoseconds."""
    return {file.name: os.stat(file).st_mtime_ns for file in {entry.file for entry in source.entries.values()}}


def check_base_unchanged(
    source: Source, jobs: Iterable[Job], done: Mapping[str, dict[str, Any]], before: Mapping[str, int]
) -> None:
    """Read again what was split or copied, where its file was touched since.

    Args:
        done: job -> its record.
        before: the base's files -> when each had been changed last as the run began.

    Raises:
        CheckpointError: naming tensors that are not what they were.
    """
    touched = {name for name, time in modification_times(source).items() if before.get(name) != time}
    changed = []
    for job in jobs:
        if job.name not in done:
            continue
        for name in (name for name in job.sources if source.entries[name].file.name in touched):
            if sha256(source.chunks(name)) != done[job.name]["base"][name]:
                changed.append(name)
    if changed:
        raise CheckpointError(
            f"{source.path} was changed since the run began: {listed(changed)}; put the old files back, "
            "or name another directory"
        )
