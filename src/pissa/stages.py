"""What is being done just now, in words, for whoever asks: the command line says it after a silence.

    with stage("loading MODEL"):
        …

Work that takes seconds names itself so. Nothing is printed here, and nothing costs anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SILENT = ""
"""The stage in which nothing is to be said: somebody is being waited for."""
_entered: list[str] = []


@contextmanager
def stage(words: str) -> Iterator[None]:
    """Name what the block does, until it ends."""
    _entered.append(words)
    try:
        yield
    finally:
        _entered.remove(words)


def current() -> str | None:
    """The innermost stage, if there is any."""
    return _entered[-1] if _entered else None
