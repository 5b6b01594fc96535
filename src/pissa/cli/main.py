"""The `pissa` command: its subcommands, and what its exit codes mean.

0   done
1   our fault: a traceback follows
2   the input is wrong: one line says what and how to mend it
130 interrupted: one line says what is saved
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from ..errors import PissaError
from . import compare, demo, eval, export, init, inspect, study, train, verify

app = typer.Typer(
    name="pissa",
    help="Fine-tune pretrained models through their principal components (PiSSA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None]) -> None:
    """Register a subcommand; what an interruption says is printed before typer turns it into an exit code."""

    @functools.wraps(command)
    def interruptible(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            _complain(str(interrupt) or "interrupted")
            raise

    app.command(name)(interruptible)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with one of the codes above."""
    # bitsandbytes reports at import that an optional kernel package is absent, which nobody needs to act on
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except PissaError as error:
        _complain(str(error))
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        usage = _usage_error(error)
        if usage is None:
            raise
        _complain(usage)
        sys.exit(2)


def show(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result: one JSON document, or the text for people."""
    print(json.dumps(document, indent=2) if as_json else text)


def _complain(message: str) -> None:
    print(f"pissa: {' '.join(message.split())}", file=sys.stderr)


def _usage_error(error: Exception) -> str | None:
    """The message of a wrong flag or argument; None for any other exception."""
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    context = getattr(error, "ctx", None)
    hint = f"; see {context.command_path} --help" if context is not None else ""
    return f"{message().rstrip('.')}{hint}"


_add("init", init.command)
_add("train", train.command)
_add("eval", eval.command)
_add("export", export.command)
_add("verify", verify.command)
_add("inspect", inspect.command)
_add("compare", compare.command)
_add("demo", demo.command)
_add("study", study.command)
