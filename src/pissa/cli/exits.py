"""How a command line ends, and what its exit codes mean.

0   done
1   our fault: a traceback follows
2   the input is wrong: one line says what and how to mend it
130 interrupted: one line says what is saved
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import typer

from ..errors import PissaError
from ..outside.text import on_one_line
from .heartbeat import heartbeat
from .output import complain

INTERRUPTED = 130
PROMPT = 2.0
"""Seconds after an interruption in which an error is taken for its consequence."""
AGAIN = 0.05
"""Seconds until an interruption that was dropped comes once more."""
_interrupted_at = float("-inf")
_told = False
"""Whether it has been said what the interruption leaves."""
BEFORE_ANY = "interrupted before anything began: the same command starts again"
PLACES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS)
"""What the system says of a path that the user gave, and that is none or not theirs."""


def interruptible(
    command: Callable[..., None], name: str = "pissa", saved: str = "the same command starts again"
) -> Callable[..., None]:
    """The command, with what an interruption says printed before typer turns it into an exit code.

    Args:
        command: what is called.
        name: what complaints begin with.
        saved: what there is of the work, and what to do, where the interruption itself does not say.
    """

    @functools.wraps(command)
    def speaking(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            _tell(str(interrupt) or f"interrupted; {saved}", name)
            raise
        except Exception as error:
            # some libraries make an error of their own of an interruption inside them
            if time.monotonic() - _interrupted_at > PROMPT:
                raise
            _tell(f"interrupted; {saved}", name)
            raise KeyboardInterrupt from error

    return speaking


def _tell(words: str, name: str) -> None:
    """Say what an interruption leaves."""
    global _told
    _told = True
    complain(words, name)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Python's own answer to Ctrl-C, noted."""
    global _interrupted_at
    _interrupted_at = time.monotonic()
    signal.default_int_handler(number, frame)


def _interrupt_again(ignored: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised where nobody can catch it, such as in a callback of its imports: an interruption that
    was dropped comes once more."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


@contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM interrupts it as Ctrl-C does; work that can stop in good order listens itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _interrupted_at, _told
    _interrupted_at, _told = float("-inf"), False
    # where Ctrl-C is ignored, as behind a shell's &, it stays so
    heard = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, *heard)}
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def run_app(app: typer.Typer, arguments: list[str] | None, name: str = "pissa") -> None:
    """Run a command line and exit with one of the codes above."""
    # bitsandbytes reports at import that an optional kernel package is absent, which nobody needs to act on
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers would fetch kernels from the hub, and run them, wherever the package `kernels` is installed
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    # PEFT's remark on every adapter that was moved, or whose base was; which base it fits is checked by its weights
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
    shown, warnings.showwarning = warnings.showwarning, _warn
    try:
        # in a program of its own; whoever calls from Python, a test for one, hears no more than it says
        with terminable(), heartbeat(name) if arguments is None else nullcontext():
            code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED and not _told:
            complain(BEFORE_ANY, name)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        complain(BEFORE_ANY, name)
        sys.exit(INTERRUPTED)
    except PissaError as error:
        complain(str(error), name)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in PLACES:
            raise
        complain(f"{str(error.filename)[:200]} cannot be used: {error.strerror}; give another path", name)
        sys.exit(2)
    except Exception as error:
        usage = _usage_error(error)
        if usage is None:
            raise
        if usage:
            complain(usage, name)
        sys.exit(2)
    finally:
        warnings.showwarning = shown


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line, in which no name steers the terminal."""
    print(f"warning: {on_one_line(str(message))}", file=sys.stderr)


def _usage_error(error: Exception) -> str | None:
    """The message of a wrong flag or argument; None for any other exception, nothing where all is said."""
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    if not message():
        return ""  # without any words, the help has been shown
    context = getattr(error, "ctx", None)
    details = getattr(error.__cause__, "errors", list)()  # of the library that reads numbers
    given = f" is {details[0]['input']!r}; " if details else ": "
    wanted = functools.partial(_wanted, given)
    said, values = re.subn(r"^Invalid value for '([^']+)': Input should be (.*)", wanted, message().rstrip("."))
    hint = f"; see {context.command_path} --help" if context is not None and not values else ""
    return f"{said}{hint}"


def _wanted(given: str, found: re.Match[str]) -> str:
    """What a flag was given and what it takes, in the words of our own checks."""
    kinds = {"a valid integer": "a whole number", "a valid number": "a number"}
    wanted = found[2].split(",")[0].replace("greater than or equal to", "a number of at least")
    return f"{found[1]}{given}give {kinds.get(wanted, wanted.replace('less than or equal to', 'a number of at most'))}"
