"""Several processes, on one machine or many that share a file system, make one checkpoint.

Everyone has the same plan and writes into the same preallocated files, each tensor at its own place. So there is little
to agree on: who takes which job, which is a counter (the costly jobs come first, and whoever is free takes the next),
and who has come how far. Both are kept in the key-value store by which `torchrun`'s processes find each other; no
tensor is ever sent, so that it does not matter whether they would talk over gloo or NCCL.

A process that dies lets go of its journal's lock. The others notice, finish what they have in hand, and stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ...errors import Interrupted, PissaError
from .journal import is_held

JOINED = "joined"
"""What a process announces when it holds its journal."""


class Team(Protocol):
    """The processes of a run."""

    rank: int
    size: int

    def claim(self) -> int:
        """The number of the next job that nobody has taken."""
        ...

    def announce(self, what: str) -> None:
        """Tell the others that this process has come so far."""
        ...

    def reached(self, what: str, *, everyone: bool = False) -> bool:
        """Whether rank 0, or everyone, has come so far."""
        ...

    def check(self) -> None:
        """Look after the others.

        Raises:
            PissaError: one failed, and said why.
            Interrupted: one ended without a word.
        """
        ...

    def fail(self, reason: str) -> None:
        """Tell the others why this process cannot go on."""
        ...


class Alone:
    """A run of one process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._next = count()

    def claim(self) -> int:
        """The next number."""
        return next(self._next)

    def announce(self, what: str) -> None:
        """There is nobody to tell."""

    def reached(self, what: str, *, everyone: bool = False) -> bool:
        """There is nobody to wait for."""
        return True

    def check(self) -> None:
        """There is nobody to look after."""

    def fail(self, reason: str) -> None:
        """There is nobody to tell."""


class Processes:
    """A run of several processes, started by `torchrun` or another launcher that sets its variables."""

    def __init__(self, store: Any, rank: int, size: int, work: Path) -> None:
        """Join them.

        Args:
            store: torch.distributed's key-value store.
            rank: of this process.
            size: how many there are.
            work: where their journals lie.
        """
        self.rank, self.size = rank, size
        self._store, self._work = store, work

    def claim(self) -> int:
        """The number of the next job that nobody has taken."""
        with self._connected():
            return self._store.add("pissa/claimed", 1) - 1

    def announce(self, what: str) -> None:
        """Tell the others that this process has come so far."""
        with self._connected():
            self._store.set(f"pissa/{what}/{self.rank}", "yes")

    def reached(self, what: str, *, everyone: bool = False) -> bool:
        """Whether rank 0, or everyone, has come so far."""
        return all(self._said(what, rank) for rank in range(self.size if everyone else 1))

    def check(self) -> None:
        """Look after the others: who failed, and who joined and holds its journal no more."""
        self._check_failed()
        for rank in range(self.size):
            if rank != self.rank and self._said(JOINED, rank) and not is_held(self._work, rank):
                self._check_failed()  # whoever fails says so before it lets go
                raise Interrupted(f"process {rank} of {self.size} ended")

    def fail(self, reason: str) -> None:
        """Tell the others why this process cannot go on."""
        with suppress(Interrupted), self._connected():  # the others may be gone
            self._store.set("pissa/failed", f"process {self.rank} of {self.size} failed: {reason}")

    def _check_failed(self) -> None:
        with self._connected():
            if self._store.check(["pissa/failed"]):
                raise PissaError(self._store.get("pissa/failed").decode())

    def _said(self, what: str, rank: int) -> bool:
        with self._connected():
            return self._store.check([f"pissa/{what}/{rank}"])

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """The store is gone when the process that keeps it is: the launcher's agent, or rank 0."""
        from torch.distributed import DistError

        try:
            yield
        except DistError as error:
            raise Interrupted("the process that the others meet at ended") from error


def assemble(work: Path, environment: Callable[[str], str | None] = os.environ.get) -> Team:
    """The processes of this run, as the launcher's variables name them; one alone where there are none.

    Args:
        work: where their journals will lie.
        environment: looks a variable up.
    """
    if int(environment("WORLD_SIZE") or 1) == 1:
        return Alone()
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    return Processes(store, rank, size, work)
