"""The files of a checkpoint in the making: tensors go to their places in any order, and are noted once they are safe.

A note in the journal is a promise that the data is on the disk, so the data is flushed first. Flushing is slow and
notes are small: both wait until a few hundred megabytes or some seconds have come together, on a thread of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ...provenance import sha256
from .journal import Journal
from .layout import FileLayout, raw_bytes

COMMIT_BYTES, COMMIT_SECONDS = 256 << 20, 5.0
PIECE = 1 << 26


class Outputs:
    """Allocated files, open for writing; a context manager."""

    def __init__(self, directory: Path, files: Iterable[FileLayout]) -> None:
        self._directory, self._files = directory, list(files)
        self._descriptors: dict[str, int] = {}
        self.places = {tensor: (file.name, at) for file in self._files for tensor, at in file.offsets.items()}
        """Tensor -> (file, offset)."""

    def __enter__(self) -> Outputs:
        for file in self._files:
            self._descriptors[file.name] = os.open(self._directory / file.name, os.O_WRONLY | os.O_CLOEXEC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; its sha256."""
        view = raw_bytes(tensor)
        self.put(name, 0, view)
        return sha256(view)

    def put(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Put a piece of a tensor in its place.

        Args:
            start: of the piece, in bytes from the tensor's beginning.
        """
        file, offset = self.places[name]
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptors[file], view[done : done + PIECE], offset + start + done)

    def flush(self, files: Iterable[str]) -> None:
        """Have these files' data on the disk."""
        flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
        for file in files:
            flush(self._descriptors[file])


class Commits:
    """Collects finished work, and notes it in the journal once its data is on the disk."""

    def __init__(self, outputs: Outputs, journal: Journal) -> None:
        self._outputs, self._journal = outputs, journal
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._records: list[dict[str, Any]] = []
        self._size, self._since = 0, time.monotonic()

    def add(self, record: dict[str, Any], size: int) -> None:
        """Take a finished job's record.

        Args:
            size: bytes that it wrote.
        """
        self._records.append(record)
        self._size += size
        due = self._size >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS
        if due and (self._running is None or self._running.done()):
            self._begin()

    def close(self) -> None:
        """Note everything that was added, and wait until it is."""
        try:
            self._begin()
            if self._running is not None:
                self._running.result()
        finally:
            self._thread.shutdown()

    def _begin(self) -> None:
        if self._running is not None:
            self._running.result()
        records, self._records = self._records, []
        self._size, self._since = 0, time.monotonic()
        self._running = self._thread.submit(self._commit, records)

    def _commit(self, records: list[dict[str, Any]]) -> None:
        if records:
            self._outputs.flush(sorted({self._outputs.places[name][0] for r in records for name in r["tensors"]}))
            self._journal.append(records)
