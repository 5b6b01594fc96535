"""Work on what a stranger wrote, stopped when it takes too long or too much memory.

A chat template is a program and a regular expression can be one. `bounded` lets such work go on in this process for so
many seconds and so much additional memory. It does NOT cover a single operation inside the interpreter that neither
allocates nor returns (a power of large numbers, for example): whoever calls it rules those out beforehand.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

PAGE = mmap.PAGESIZE


class LimitError(Exception):
    """The work took too long, or more memory than it may."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Let a block run for so long, and take so much memory more than the process has.

    Args:
        seconds: of wall-clock time.
        memory: bytes of address space; not bounded where the system has no such limit.

    Raises:
        LimitError: it was stopped.
    """
    with ExitStack() as held:
        held.enter_context(_less_memory(memory))
        alarm = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        held.enter_context((_alarm if alarm else _watchdog)(seconds))
        try:
            yield
        except MemoryError as error:
            raise LimitError(f"it takes more than {memory >> 20:,} MiB") from error


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """By the system's timer, whose signal also ends a match of a regular expression; an earlier timer goes on after."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitError(f"it takes more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous if previous is not None else signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


@contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """By an exception that another thread raises in this one, between two instructions of Python.

    One that is on its way is waited for and never called back: calling it back would leave the interpreter looking for
    it for ever, which makes it slower, and makes Python 3.11 hang under a debugger.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    lock, done, sent = threading.Lock(), threading.Event(), threading.Event()

    def stop() -> None:
        with lock:
            if not done.is_set():
                sent.set()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Stopped))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
            timer.cancel()
            for _ in range(1000 if sent.is_set() else 0):
                pass
    except _Stopped:
        pass
    if sent.is_set():
        raise LimitError(f"it takes more than {seconds:g} s")


class _Stopped(Exception):
    """What the other thread raises here; an asynchronous exception has no message."""


@contextmanager
def _less_memory(memory: int) -> Iterator[None]:
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE
        before = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError, ValueError):
        yield
        return
    wanted = size + memory
    known = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
