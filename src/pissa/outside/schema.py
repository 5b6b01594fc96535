"""A JSON value held against a dataclass before anybody uses it.

A schema is a dataclass that is never instantiated: its fields' types say what a document has to hold. A field without a
default is required; a field that the dataclass does not have is allowed, since a later version may have written it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_NUMBER = 1 << 63
WORDS: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number", None: "null"}
WORDS |= {type(None): "null", dict: "an object", list: "a list"}


def wrong_fields(value: Any, kind: Any, where: str = "") -> Iterator[str]:
    """What in a JSON value is not of the type that it should be, one phrase each.

    Args:
        value: as `parse` gives it.
        kind: a dataclass, `str`, `bool`, `int`, `float`, `None`, `Any`, a `Literal`, `list[T]`, `tuple[T, ...]`,
            `dict[str, T]`, a union of those, or `Annotated[T, test, "what it has to be"]`. An int is below 2^63, a
            float is finite.
        where: the name of the value, for the phrases.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or _is_simple(value, kind):
        return
    if origin is Annotated:
        found = list(wrong_fields(value, arguments[0], where))
        test, wanted = arguments[1:3]
        if not found and not test(value):
            found.append(f"{where or 'it'} is {short(value)} and not {wanted}")
        yield from found
    elif origin in (Union, types.UnionType):
        if not any(next(wrong_fields(value, each, where), None) is None for each in arguments):
            nested = [each for each in arguments if is_dataclass(each) and isinstance(value, dict)]
            if nested:  # what is said is that of the kind that it resembles most
                yield from min((list(wrong_fields(value, each, where)) for each in nested), key=len)
            else:
                yield f"{where or 'it'} is {short(value)} and not {_name(kind)}"
    elif is_dataclass(kind) and isinstance(value, dict):
        yield from _wrong_of_object(value, kind, where)
    elif origin in (list, tuple) and isinstance(value, list):
        for number, each in enumerate(value):
            yield from wrong_fields(each, arguments[0], f"{where}[{number}]")
    elif origin is dict and isinstance(value, dict):
        for key, each in value.items():
            yield from wrong_fields(key, arguments[0], f"the name {short(key)} in {where or 'it'}")
            name = ascii(key)[1:-1][:80]
            yield from wrong_fields(each, arguments[1], f"{where}.{name}" if where else name)
    else:
        yield f"{where or 'it'} is {short(value)} and not {_name(kind)}"


def short(value: Any) -> str:
    """A value for a message: on one line, and no longer than a line."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if type(value) is int and abs(value) >= LARGEST_NUMBER:
        return "a number of more than 64 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:20]}…{text[-37:]}"


def _wrong_of_object(value: dict[str, Any], schema: Any, where: str) -> Iterator[str]:
    types_of = get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        name = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            yield from wrong_fields(value[field.name], types_of[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            yield f"{name} is missing"


def _is_simple(value: Any, kind: Any) -> bool:
    """Whether a value is of one of the kinds that have no parts."""
    if kind is None or kind is type(None):
        return value is None
    if kind in (str, bool):
        return type(value) is kind
    if kind is int:
        return type(value) is int and abs(value) < LARGEST_NUMBER
    if kind is float:
        return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < LARGEST_NUMBER
    if get_origin(kind) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(kind))
    return kind in (dict, list) and type(value) is kind


def _name(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(arguments[2])
    if origin is Literal:
        return " or ".join(repr(each) for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(each) for each in arguments)
    if origin in (list, tuple):
        return "a list"
    return "an object" if origin is dict or is_dataclass(kind) else WORDS[kind]
