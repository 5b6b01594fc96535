"""The `pissa` command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .exits import run_app
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


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; `exits.py` says what its codes mean."""
    run_app(app, arguments)
