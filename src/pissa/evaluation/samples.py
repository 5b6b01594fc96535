"""Samples as they are made: one JSON line each, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.disk.write import explained
from ..errors import OutputError
from ..outside.documents import Unreadable, parse_object
from ..outside.schema import wrong_fields


@dataclass(frozen=True)
class Sample:
    """What every line has, whatever the task."""

    index: int
    """Of the problem."""


class SampleLog:
    """The samples of one evaluation by index, kept in a file where there is one.

    A line that a killed process left half-written is cut off when the file is opened again.

    Args:
        path: of the JSON lines; None keeps the samples in memory alone.

    Raises:
        OutputError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.samples: dict[int, dict[str, Any]] = {}
        if path is not None and path.is_file():
            with explained(path):
                self._read(path)

    def __contains__(self, index: int) -> bool:
        return index in self.samples

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, samples: Iterable[dict[str, Any]]) -> None:
        """Keep samples, each with its `index`; one that is there already stays as it is."""
        new = [sample for sample in samples if sample["index"] not in self.samples]
        if self.path is not None and new:
            with explained(self.path), self.path.open("ab") as file:
                file.write("".join(json.dumps(sample) + "\n" for sample in new).encode())
                file.flush()
                os.fsync(file.fileno())
        self.samples.update((sample["index"], sample) for sample in new)

    def in_order(self) -> list[dict[str, Any]]:
        """All samples, in the order of the problems."""
        return [self.samples[index] for index in sorted(self.samples)]

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    sample = parse_object(line)
                    wrong = next(wrong_fields(sample, Sample), None)
                    if wrong is not None:
                        raise Unreadable(wrong)
                    self.samples[sample["index"]] = sample
                except Unreadable as error:
                    raise OutputError(
                        f"{path}:{number} is not a sample of an evaluation; name another directory, or remove the file"
                    ) from error
                whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)
