"""No silence: when nothing was written for a few seconds, a line on stderr says what is being done and for how long.

A bar or a line of the command itself counts, so that this is seen only where they have nothing to say: while libraries
are imported, a model is loaded or fetched, a checkpoint merged. In a terminal one line is written over and over; in a
file each is a line.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..outside.text import on_one_line
from ..stages import SILENT, current

SILENCE = 4.0
"""Seconds after which something is said."""
BEFORE_ANY, BETWEEN = "starting", "working"
"""What is said where no stage has begun yet, and where none is going on."""
CLEAR = "\r\x1b[2K"


@contextmanager
def heartbeat(name: str = "pissa") -> Iterator[None]:
    """Break silences while the block runs.

    Args:
        name: what the lines begin with.
    """
    if int(os.environ.get("RANK") or 0) > 0:  # of several processes the first speaks
        yield
        return
    beat = _Heartbeat(name)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Heard(sys.stdout, beat), _Heard(sys.stderr, beat)  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=beat.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        beat.ended.set()
        thread.join()
        beat.hear()
        sys.stdout, sys.stderr = before


class _Heartbeat:
    """When something was written last, and what is said after a silence."""

    def __init__(self, name: str) -> None:
        self.name, self.stream, self.ended = name, sys.stderr, threading.Event()
        self.lock = threading.RLock()
        self.last = self.since = time.monotonic()
        self.shown = False
        self.words = BEFORE_ANY
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        """In a forked process, where nobody would release a lock that was held."""
        self.lock = threading.RLock()

    def run(self) -> None:
        """Until it is ended."""
        while not self.ended.wait(SILENCE / 8):
            found, now = current(), time.monotonic()
            if found == SILENT:
                self.last = now
                continue
            words = found or (BEFORE_ANY if self.words == BEFORE_ANY else BETWEEN)
            if words != self.words:
                self.words, self.since = words, now
            if now - self.last >= SILENCE:
                self._say(f"{self.name}: {on_one_line(words)}, {now - self.since:.0f} s so far")

    def hear(self) -> None:
        """Something else is about to be written."""
        with self.lock:
            self.last = time.monotonic()
            if self.shown:
                self.shown = False
                self.stream.write(CLEAR)

    def _say(self, line: str) -> None:
        with self.lock:
            self.last = time.monotonic()
            terminal = self.stream.isatty()
            self.stream.write(f"{CLEAR}{line}" if terminal else f"{line}\n")
            self.stream.flush()
            self.shown = terminal


class _Heard:
    """A stream of which every word is heard."""

    def __init__(self, stream: TextIO, beat: _Heartbeat) -> None:
        self._stream, self._beat = stream, beat

    def write(self, text: str) -> int:
        """Write, and note that it was."""
        with self._beat.lock:
            self._beat.hear()
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
