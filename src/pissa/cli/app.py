"""The `pissa` command and its options; `parser.py` finds its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .parser import Group

app = typer.Typer(
    name="pissa",
    cls=Group,
    help="Fine-tune pretrained models through their principal components (PiSSA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"pissa {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
