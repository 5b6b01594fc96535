"""Processes that die at a chosen moment: what a crash, the kernel or a user leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pissa.training.progress import StepLog


def in_child(work: Callable[[], Any]) -> int | None:
    """Do something in a forked process; its exit code, negative for the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the child did not end"
    return process.exitcode


def signal_at_step(step: int, work: Callable[[], Any], *, number: int = signal.SIGKILL, times: int = 1) -> None:
    """Do the work, with a signal to this process when the log gets the line of a step."""
    original = StepLog.on_log

    def on_log(self: StepLog, args: Any, state: Any, control: Any, logs: Any = None, **context: Any) -> None:
        original(self, args, state, control, logs, **context)
        if logs and "loss" in logs and state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    StepLog.on_log = on_log  # type: ignore[method-assign]
    try:
        work()
    finally:
        StepLog.on_log = original  # type: ignore[method-assign]


def kill_at_change(moment: int, out: Path, work: Callable[[], Any]) -> None:
    """Do the work, and die just before the given change (open for writing, rename, removal) under a directory.

    To be called in a child: the hook stays for the life of the process.
    """
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        if event == "open" and arguments[1] in ("r", "rb"):
            return
        if str(arguments[0]).startswith(str(out)):
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
