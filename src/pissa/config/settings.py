"""Settings that are declared once: a field's type says what is allowed, the text below it what it is for.

    rank: Count = 16
    \"\"\"How many components each adapter has.\"\"\"

From this line come the check of a value, its reading from text (flags, and YAML, which takes `2e-4` for text), the flag
with its help and the panel in which --help shows it (`panel` of the class that declares the field), and the pages.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

BOOL = "BOOL"
"""How --help shows a switch."""


class Rule(NamedTuple):
    """Which values of a type are allowed; `Annotated[int, Rule(…)]` is a kind of setting."""

    words: str
    """What to say to whoever gave another value, such as "give a positive number"."""
    holds: Callable[[Any], bool]
    """Whether a value of the type is allowed."""
    read: Callable[[Any], Any] | None = None
    """Makes a value of what flags and YAML hold; what it cannot read it returns as it is."""
    form: str | None = None
    """How a flag's value is written, for --help."""


@dataclass(frozen=True)
class Setting:
    """One declared field."""

    name: str
    kind: Any
    """The type, with its `Rule`."""
    default: Any
    doc: str
    panel: str
    """Where --help shows it: `panel` of the class that declares it."""

    def problem(self, value: Any, called: str | None = None) -> str | None:
        """What is wrong with a value, in one sentence; None for nothing."""
        if is_allowed(value, self.kind):
            return None
        choices = choices_of(self.kind)
        return f"{called or self.name} is {value!r}; {words(self.kind)}{did_you_mean(value, choices)}"


@cache
def settings_of(owner: type) -> dict[str, Setting]:
    """The fields of a dataclass of settings, by name and in order.

    Args:
        owner: the dataclass; a field that several of its bases declare is that of the first one in their order.
    """
    kinds = get_type_hints(owner, include_extras=True)
    found = {}
    for field in fields(owner):
        declaring = next(base for base in owner.__mro__ if field.name in inspect.get_annotations(base))
        docs = (_docs(base).get(field.name) for base in owner.__mro__ if base is not object)
        doc = next((doc for doc in docs if doc), "")
        panel = getattr(declaring, "panel", "Options")
        found[field.name] = Setting(field.name, kinds[field.name], _default(field), doc, panel)
    return found


def check_settings(instance: Any, prefix: str = "") -> None:
    """Hold every field of a dataclass of settings against its type.

    Raises:
        ConfigError: naming every value that is not allowed, and what is.
    """
    settings = settings_of(type(instance)).values()
    wrong = [problem for setting in settings if (problem := setting.problem(getattr(instance, setting.name)))]
    if wrong:
        raise ConfigError(prefix + "; ".join(wrong))


def read_settings(instance: Any) -> None:
    """Put in the place of every field's text what it means, and tuples in the place of lists; for `__post_init__`."""
    for setting in settings_of(type(instance)).values():
        object.__setattr__(instance, setting.name, read(getattr(instance, setting.name), setting.kind))


def is_allowed(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        rules = [rule for rule in parts[1:] if isinstance(rule, Rule)]
        return is_allowed(value, parts[0]) and all(rule.holds(value) for rule in rules)
    if origin in (Union, UnionType):
        return any(is_allowed(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if kind in (int, float):
        return is_number(value) and (kind is float or isinstance(value, int))
    return kind is Any or isinstance(value, origin or kind)


def words(kind: Any) -> str:
    """What is allowed of a kind, as advice."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next(rule.words for rule in parts[1:] if isinstance(rule, Rule))
    if origin in (Union, UnionType):
        members = [part for part in parts if part is not NoneType]
        first, *others = (words(part) for part in members)
        return ", or ".join([first, *(other.removeprefix("allowed: ").removeprefix("give ") for other in others)])
    if origin is Literal:
        return f"allowed: {', '.join(map(str, parts))}"
    plain = {int: "give a whole number", float: "give a number", bool: "give true or false", str: "give text"}
    return plain.get(kind, f"give {getattr(kind, '__name__', kind)}")


def form(kind: Any) -> str:
    """How a flag's value of a kind is written, for --help."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        forms = [rule.form for rule in parts[1:] if isinstance(rule, Rule) and rule.form]
        return forms[0] if forms else form(parts[0])
    if origin in (Union, UnionType):
        return next(form(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return "NAME" if isinstance(parts[0], str) else "INT"
    return {int: "INT", float: "NUMBER", bool: BOOL, str: "TEXT"}.get(kind, "VALUE")


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a kind that has a list of them."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Annotated, Union, UnionType):
        return tuple(choice for part in get_args(kind) for choice in choices_of(part))
    return ()


def read(value: Any, kind: Any) -> Any:
    """A value as its kind has it: numbers of text, tuples of lists. What cannot be read is returned as it is."""
    if get_origin(kind) is Annotated:
        readers = [rule.read for rule in get_args(kind)[1:] if isinstance(rule, Rule) and rule.read]
        return readers[0](value) if readers else read(value, get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        means = [read(value, part) for part in get_args(kind)]
        told = next((meant for meant in means if type(meant) is not type(value)), value)
        return next((meant for meant in means if is_allowed(meant, kind)), told)
    if isinstance(value, list):
        return tuple(value)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if isinstance(value, str) and str(choice) == value), value)
    if kind is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind in (int, float) and not isinstance(value, bool):
        return _number(value, kind)
    return value


def did_you_mean(given: Any, choices: Iterable[Any]) -> str:
    """The end of a complaint about a name: which one was probably meant; empty where none is near."""
    near = nearest(given, choices)
    return f"; did you mean {near}?" if near else ""


def nearest(given: Any, choices: Iterable[Any]) -> str | None:
    """The choice that a name was probably meant to be, whatever its case; None where none is near."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(given).lower(), names, n=1)
    return names[near[0]] if near else None


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; True and False are not meant to be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, kind: type) -> Any:
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
        return number if kind is float else int(number) if int(number) == number else value
    except (TypeError, ValueError, OverflowError):
        return value


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


@cache
def _docs(owner: type) -> dict[str, str]:
    """The text below each field that a class itself declares; nothing where its source is not at hand."""
    for node in _classes(owner.__module__):
        if node.name == owner.__name__:
            return {
                field.target.id: " ".join(inspect.cleandoc(text.value.value).split())
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return {}


@cache
def _classes(module: str) -> list[ast.ClassDef]:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return []
    return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
