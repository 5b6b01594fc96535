"""How the command line reads its words: typer's way, with each command loaded when it is called.

A switch may be said in full: `--use-rslora` and `--use-rslora true` are the same, and so are `--no-use-rslora` and
`--use-rslora false`.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..config.settings import BOOL, did_you_mean
from .exits import interruptible

COMMANDS = ("init", "train", "eval", "chat", "export", "verify", "inspect", "compare", "demo")
"""A command's module has its name and holds it as `command`, and as INTERRUPTED what an interruption leaves."""

SPOKEN = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""How the value of a switch may be said."""


class _Help:
    """What commands and their group share: a switch is shown without a value, for it needs none."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help."""
        option = super().get_help_option(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        if option is not None:
            option.metavar = ""
        return option


class Command(_Help, TyperCommand):
    """A command."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._settings = {name for option in self.params if option.metavar == BOOL for name in option.opts}
        self._switches = _unvalued(self.params)
        if self._settings:
            example = min(self._settings)
            no = f"--no-{example.removeprefix('--')}"
            self.epilog = f"A BOOL alone means true: {example}. For false, say {no} or {example} false."

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of a command line."""
        return super().parse_args(ctx, self._plain(args))

    def _plain(self, words: list[str]) -> list[str]:
        """The words in the one form that each switch is declared with."""
        found: list[str] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--":
                return [*found, word, *left]
            name, joined, value = word.partition("=")
            spoken = bool(left) and left[0].lower() in SPOKEN
            if not joined and name in {*self._settings, *self._switches}:
                value = left.pop(0) if spoken else "true"
            positive = f"--{name.removeprefix('--no-')}"
            if name in self._settings:
                word = f"{name}={str(SPOKEN[value.lower()]).lower() if value.lower() in SPOKEN else value}"
            elif positive in self._settings and not joined:
                word = f"{positive}=false"
            elif name in self._switches and value.lower() in SPOKEN:
                # a switch without an opposite is off where it is left out
                word = name if SPOKEN[value.lower()] else next(iter(self._switches[name]), "")
            found += [word] if word else []
        return found


class Group(_Help, TyperGroup):
    """The group of all commands; each is imported when it is called, and for the list only its text is read."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _unvalued(self.params)

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command as it stands in the list."""
        return TyperCommand(cmd_name, help=_summary(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, and its words."""
        if args and args[0] in COMMANDS:
            return args[0], load_command(args[0]), args[1:]
        if args and not args[0].startswith("-"):
            near = did_you_mean(args[0], COMMANDS) or f"; allowed: {', '.join(COMMANDS)}"
            ctx.fail(f"{args[0]} is no command{near}")
        return super().resolve_command(ctx, args)


def load_command(name: str) -> Any:
    """The command of this name, from the module of this name."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    help_names = {"help_option_names": ["-h", "--help"]}
    module = import_module(f".{name}", __package__)
    speaking = interruptible(module.command, saved=module.INTERRUPTED)
    app.command(name, cls=Command, context_settings=help_names)(speaking)
    return typer.main.get_command(app)


def _unvalued(options: list[Any]) -> dict[str, list[str]]:
    """The names of the switches among options, each with its opposites; --help shows them without a value."""
    switches = [option for option in options if getattr(option, "is_bool_flag", False)]
    for option in switches:
        option.metavar = ""
    return {name: option.secondary_opts for option in switches for name in option.opts}


def _summary(name: str) -> str:
    """The text of a command, read from its file."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command")
    return ast.get_docstring(next(functions)) or ""
