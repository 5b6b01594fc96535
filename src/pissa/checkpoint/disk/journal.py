"""What is finished, for whoever continues: one file of JSON lines per process, appended after the data is on the disk.

A line counts only when it is whole and carries the right digest of itself, so a line that a crash tore is as if it had
not been written. Each process holds a lock on its own journal for as long as it lives: a second run of the same command
is refused, and the others of a run notice one that died.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...outside.documents import Unreadable, parse_object
from ...outside.schema import wrong_fields
from ...provenance import sha256
from .write import locked

NAME = "journal-{}.jsonl"
DIGEST_LENGTH = 16


class Journal:
    """A process's own journal, open for appending."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Open or make it, and cut off what a crash left unfinished.

        Raises:
            OutputError: another process holds it.
        """
        self.path = directory / NAME.format(rank)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if not locked(self._descriptor):
            os.close(self._descriptor)
            raise OutputError(
                f"another process is writing into {directory.parent}; wait for it, or name another directory"
            )
        os.ftruncate(self._descriptor, sum(len(line) for line in _whole_lines(self.path)))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records and flush them to the disk."""
        text = b"".join(map(_line, records))
        while text:
            text = text[os.write(self._descriptor, text) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the journal and its lock."""
        os.close(self._descriptor)


def read_journals(directory: Path) -> list[dict[str, Any]]:
    """Every whole record of every process, in no particular order."""
    records = []
    for path in sorted(directory.glob(NAME.format("*"))):
        records += map(_record, _whole_lines(path))
    return records


def is_journal(name: str) -> bool:
    """Whether a file's name is that of a process's journal."""
    return re.fullmatch(NAME.format(r"\d+").replace(".", r"\."), name) is not None


def forget(directory: Path, tensors: set[str] | None = None) -> None:
    """Drop, from every journal, the records of jobs that wrote one of these tensors; nobody may be appending.

    Args:
        directory: in which the journals lie.
        tensors: whose records are dropped; None for all.
    """
    for path in sorted(directory.glob(NAME.format("*"))):
        lines = _whole_lines(path)
        kept: list[bytes] = (
            [] if tensors is None else [line for line in lines if not tensors & {*_record(line).get("tensors", {})}]
        )
        if len(kept) != len(lines):
            # in place, because its lock may be held by this very process
            with path.open("r+b") as stream:
                stream.write(b"".join(kept))
                stream.truncate()
                stream.flush()
                os.fsync(stream.fileno())


def is_held(directory: Path, rank: int) -> bool:
    """Whether the process of this rank lives and holds its journal, or has taken it away, which is the last it does."""
    try:
        descriptor = os.open(directory / NAME.format(rank), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return not locked(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class JournalRecord:
    """One line: what was made of which of the base's tensors."""

    task: str
    base: dict[str, str]
    """Tensor of the base -> sha256."""
    tensors: dict[str, str]
    """Tensor that was written -> sha256."""
    certificate: dict[str, Any] = field(default_factory=dict)
    """Of a split."""


def _is_record(text: bytes) -> bool:
    try:
        return next(wrong_fields(parse_object(text), JournalRecord), None) is None
    except Unreadable:
        return False


def _record(line: bytes) -> dict[str, Any]:
    return parse_object(line[DIGEST_LENGTH + 1 :])


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return _digest(text) + b" " + text + b"\n"


def _digest(text: bytes) -> bytes:
    return sha256(text)[:DIGEST_LENGTH].encode()


def _whole_lines(path: Path) -> list[bytes]:
    """The lines up to the first that is torn or damaged."""
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        digest, text = line[:DIGEST_LENGTH], line[DIGEST_LENGTH + 1 : -1]
        if not line.endswith(b"\n") or digest != _digest(text) or not _is_record(text):
            break
        lines.append(line)
    return lines
