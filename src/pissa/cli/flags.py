"""Flags made from a dataclass of settings: each field's name, type, default and text become a flag and its help.

    @with_settings(Recipe)
    def command(model: …, settings: dict[str, Any]) -> None: ...

gives `command` every field of Recipe as a flag, in the panel of the class that declares the field; `settings` holds
those that were given, each held against its type before anything heavy is imported.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from typing import Annotated, Any

import typer

from ..config.settings import Setting, choices_of, form, read, settings_of
from ..errors import ConfigError, PissaError

SHORT = {"learning_rate": ("--lr",)}
"""Further names of flags."""


def with_settings(
    owner: type,
    *,
    only: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
    into: str = "settings",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes the fields of a dataclass as flags.

    Args:
        owner: the dataclass.
        only: the fields that become flags; None for all.
        names: what flags are called where it is not the field's name with dashes, by field.
        into: the parameter that takes them.

    Returns:
        A decorator; what it decorates gets the values of the flags that were given, by field.
    """
    settings = [setting for name, setting in settings_of(owner).items() if only is None or name in only]
    panels = list(dict.fromkeys(getattr(base, "panel", "") for base in reversed(owner.__mro__)))
    settings.sort(key=lambda setting: panels.index(setting.panel) if setting.panel in panels else 0)
    wanted = {setting.name: setting for setting in settings}
    flags = {name: (names or {}).get(name, f"--{name.replace('_', '-')}") for name in wanted}
    options = [_option(setting, flags[name], flags) for name, setting in wanted.items()]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != into]

        @functools.wraps(command)
        def taking(**given: Any) -> None:
            texts = {name: given.pop(name) for name in wanted if name in given}
            try:
                command(**given, **{into: _read(texts, wanted, flags)})
            except PissaError as error:
                error.args = (naming_flags(str(error), flags),)
                raise

        places = sorted([*own, *options], key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        taking.__signature__ = signature.replace(parameters=places)  # pyright: ignore[reportAttributeAccessIssue]
        taking.__annotations__ = {parameter.name: parameter.annotation for parameter in places}
        return taking

    return decorate


def naming_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message whose names of settings somebody can follow who has flags: these are put behind it.

    Args:
        text: as the library says it.
        flags: of the command, by the name of the setting.
    """
    named = [flag for name, flag in flags.items() if "_" in name and re.search(rf"(?<![\w./-]){name}(?![\w/])", text)]
    missing = [flag for flag in named if not re.search(rf"{flag}(?![\w-])", text)]
    return f"{text} (as flags: {', '.join(missing)})" if missing else text


def _option(setting: Setting, flag: str, flags: Mapping[str, str]) -> inspect.Parameter:
    """A field as typer takes a flag; its value stays text, so that one reader and one check serve flags and YAML."""
    option = typer.Option(
        flag,
        *SHORT.get(setting.name, ()),
        help=_help(setting, flags),
        metavar=form(setting.kind),
        rich_help_panel=setting.panel,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(setting.name, kind, default=None, annotation=Annotated[str | None, option])


def _help(setting: Setting, flags: Mapping[str, str]) -> str:
    """The text of a field, with its choices where it does not name them, flags for fields, and the default."""
    text = setting.doc
    choices = [str(choice) for choice in choices_of(setting.kind)]
    if any(choice not in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    others = "|".join(name for name in flags if "_" in name)
    text = re.sub(rf"\b({others})\b", lambda found: flags[found[0]], text) if others else text
    text = text.replace("[", "\\[")  # typer reads square brackets as markup
    shown = _shown(setting.default)
    return f"{text} (default: {shown})" if shown else text


def _shown(default: Any) -> str:
    """A default as it would be given; nothing where the text says what leaving it out means."""
    if default in (MISSING, None, (), {}) or default is False:
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default).lower() if default is True else str(default)


def _read(texts: Mapping[str, Any], wanted: Mapping[str, Setting], flags: Mapping[str, str]) -> dict[str, Any]:
    """What was given, read and checked.

    Raises:
        ConfigError: naming every flag whose value is not allowed.
    """
    values = {name: read(text, wanted[name].kind) for name, text in texts.items() if text is not None}
    wrong = [problem for name, value in values.items() if (problem := wanted[name].problem(value, flags[name]))]
    if wrong:
        raise ConfigError("; ".join(wrong))
    return values
