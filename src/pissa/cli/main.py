"""The `pissa` command and its subcommands."""

from __future__ import annotations

import typer

from . import compare, demo, eval, export, init, inspect, train, verify
from .exits import interruptible, run_app

app = typer.Typer(
    name="pissa",
    help="Fine-tune pretrained models through their principal components (PiSSA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _module in (init, train, eval, export, verify, inspect, compare, demo):
    app.command(_module.__name__.rpartition(".")[2])(interruptible(_module.command))


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; `exits.py` says what its codes mean."""
    run_app(app, arguments)
