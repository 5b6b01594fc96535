"""A directory that only one run may continue: the one that began it, and one process at a time.

A run's record, a JSON file, says what run it is: its settings, and whatever else has to stay the same. It is written
before anything else that lasts, and the results come last. Whoever comes with the same settings continues; whoever
comes with others is told which ones differ. Runs, evaluations, comparisons, `pissa init` and the cells of studies all
rest on this module.

What was found before the lock may be another process's by now: a run that took an hour to prepare meets the results of
one that came later and was quicker. So `held` calls the caller's check once more under the lock.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import OutputError, listed
from ...outside.documents import read_document
from .write import TEMPORARY_PREFIX, explained, locked


@dataclass(frozen=True)
class Resumable:
    """Where a run of some kind lies, and what it is called in messages."""

    path: Path
    """The directory that the user named."""
    record: Path
    """The record, in `path` or in `work`."""
    noun: str
    """What lies there: "run", "evaluation", "comparison"."""
    verb: str
    """What a process does there: "training", "evaluating", "comparing"."""
    schema: type
    """The dataclass against which the record is held."""
    work: Path | None = None
    """The directory in which the run's own files lie, which is locked; None for `path` itself."""

    @property
    def locked_place(self) -> Path:
        """The directory whose lock decides who may write."""
        return self.work or self.path

    def read(self) -> dict[str, Any] | None:
        """The record; None in a new directory.

        Raises:
            OutputError: `path` is a file or holds something else, or the record is damaged.
        """
        with explained(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise OutputError(f"{self.path} is a file; name a directory for the {self.noun}")
            if self.record.is_file():
                remedy = f"{self.path} cannot be continued: name a new directory, or remove it"
                return read_document(self.record, self.schema, error=OutputError, remedy=remedy)
            foreign = sorted(self._foreign())
        if foreign:
            raise OutputError(
                f"{self.path} already holds something else ({listed(foreign)}), and not {_a(self.noun)}; name a "
                "new or empty directory, or remove it"
            )
        return None

    def check_same(self, before: Mapping[str, Any], now: Mapping[str, Any], allowed: str = "the same settings") -> None:
        """Refuse another run's settings.

        Args:
            before: what was recorded.
            now: what is asked for.
            allowed: what the user may give instead.

        Raises:
            OutputError: naming what differs.
        """
        changed = list(differences(before, now))
        if changed:
            raise OutputError(
                f"{self.path} is another {self.noun} ({listed(changed, 8, '; ')}); give {allowed} to continue it, "
                "or name another directory"
            )

    @contextmanager
    def held(self, check: Callable[[], object] | None = None) -> Iterator[None]:
        """Make the directory and keep it for this process alone; what a killed one left half-written is taken away.

        Args:
            check: called under the lock, before anything is touched. It decides again what was decided before the
                lock, and raises an OutputError where that would be different now.

        Raises:
            OutputError: another process is at work there, or it cannot be written; or as `check`.
        """
        with only_writer(self.locked_place, f"another process is {self.verb} into {self.path}"):
            if check is not None:
                check()
            for leftover in self.leftovers():
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            yield

    def leftovers(self) -> list[Path]:
        """What a killed process left half-written."""
        return [left for place in {self.path, self.locked_place} for left in place.glob(f"{TEMPORARY_PREFIX}*")]

    def _foreign(self) -> Iterator[str]:
        """What a directory without a record holds, apart from what a killed process may have left."""
        for place in {self.path, self.locked_place}:
            for child in place.iterdir() if place.is_dir() else ():
                if child != self.work and not child.name.startswith(TEMPORARY_PREFIX):
                    yield child.name


@contextmanager
def only_writer(place: Path, busy: str) -> Iterator[None]:
    """Make a directory, if need be, and hold its lock, which ends with the process.

    A directory that is still empty at the end is taken away again.

    Raises:
        OutputError: beginning with `busy`: another process holds the lock; or the directory cannot be made.
    """
    with explained(place):
        descriptor = _open(place)
    try:
        if not locked(descriptor):
            raise OutputError(f"{busy}; wait for it, or name another directory")
        if not _is_still(descriptor, place):
            raise OutputError(f"another process took {place} away just now; give the same command again")
        try:
            yield
        finally:
            with suppress(OSError):
                place.rmdir()
    finally:
        os.close(descriptor)


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """What differs between two runs' settings, for people; objects in objects by dotted names."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif before != now:
        yield f"{where}: {_short(before)} then, {_short(now)} now"


def as_recorded(settings: Any) -> Any:
    """Settings as they will be read back from a record: JSON knows no tuples."""
    return json.loads(json.dumps(settings))


def _open(place: Path) -> int:
    place.mkdir(parents=True, exist_ok=True)
    return os.open(place, os.O_RDONLY)


def _is_still(descriptor: int, place: Path) -> bool:
    """Whether an open directory is still the one of that name: another process may have moved it in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(place))
    except OSError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:20]}…{text[-37:]}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
