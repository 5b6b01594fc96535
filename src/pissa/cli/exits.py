"""How a command line ends, and what its exit codes mean.

0   done
1   our fault: a traceback follows
2   the input is wrong: one line says what and how to mend it
130 interrupted: one line says what is saved
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from ..errors import PissaError
from ..outside.text import on_one_line
from .output import complain


def interruptible(command: Callable[..., None], name: str = "pissa") -> Callable[..., None]:
    """The command, with what an interruption says printed before typer turns it into an exit code."""

    @functools.wraps(command)
    def speaking(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            complain(str(interrupt) or "interrupted", name)
            raise

    return speaking


def run_app(app: typer.Typer, arguments: list[str] | None, name: str = "pissa") -> None:
    """Run a command line and exit with one of the codes above."""
    # bitsandbytes reports at import that an optional kernel package is absent, which nobody needs to act on
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers would fetch kernels from the hub, and run them, wherever the package `kernels` is installed
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    shown, warnings.showwarning = warnings.showwarning, _warn
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except PissaError as error:
        complain(str(error), name)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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
    hint = f"; see {context.command_path} --help" if context is not None else ""
    return f"{message().rstrip('.')}{hint}"
