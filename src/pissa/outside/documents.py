"""JSON that comes from outside, read within bounds and held against a dataclass before anybody uses it.

A file in a directory that somebody hands over may be a gigabyte, may be nested a million deep, may not be text, and may
have a list where a number is expected. `parse` bounds size and depth and accepts one reading of JSON only;
`wrong_fields` compares what was read with the fields of a dataclass; `read_document` does both for a file and turns
whatever is wrong into one line.

A schema is a dataclass that is never instantiated: its fields' types say what a document has to hold. A field without a
default is required; a field that the dataclass does not have is allowed, since a later version may have written it.
"""

from __future__ import annotations

import json
import math
import os
import stat
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import CheckpointError, PissaError

LARGEST = 1 << 25
"""Bytes of JSON that are parsed at most: parsing takes up to 24 times as much memory. 32 MiB name 200,000 tensors."""
LARGEST_YAML = 1 << 18
"""Bytes of YAML: a file of settings, and slow to parse."""
DEEPEST = 100
"""Levels of lists and objects in each other."""
LARGEST_NUMBER = 1 << 63
WORDS: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number", None: "null"}
WORDS |= {type(None): "null", dict: "an object", list: "a list"}


class Unreadable(ValueError):
    """Says of a document, in words that follow its name, why it cannot be used."""


def read_document(
    path: Path,
    schema: type,
    *,
    error: type[PissaError] = CheckpointError,
    remedy: str = "restore it from where it came from",
) -> dict[str, Any]:
    """The JSON object in a file, whose fields are of the types that a dataclass declares.

    Args:
        path: a plain file.
        schema: the dataclass.
        error: what is raised for a document that cannot be used.
        remedy: what the user is to do then; it ends the message.

    Raises:
        PissaError: of the kind `error`: the file cannot be read, is too large, is no JSON object, or has a field of
            another type.
    """
    try:
        document = parse_object(read_bounded(path))
        wrong = list(wrong_fields(document, schema))
        if wrong:
            raise Unreadable(f"is not what it should be: {listed(wrong)}")
    except Unreadable as reason:
        raise error(f"{path} {reason}; {remedy}") from reason
    return document


def read_bounded(path: Path, largest: int = LARGEST) -> bytes:
    """A plain file's bytes.

    Raises:
        Unreadable: it is missing, no plain file, or larger than that.
    """
    try:
        # a FIFO that is opened like this does not wait for somebody to write into it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Unreadable(f"is missing or cannot be opened ({error.strerror})") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise Unreadable("is no plain file")
    with os.fdopen(descriptor, "rb") as stream:
        if found.st_size > largest:
            raise Unreadable(f"is {found.st_size:,} bytes; at most {largest:,} are read")
        try:
            data = stream.read(largest + 1)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error
    if len(data) > largest:
        raise Unreadable(f"is more than {largest:,} bytes")
    return data


def parse_object(text: bytes, *, integers_only: bool = False) -> dict[str, Any]:
    """As `parse`, of a JSON object.

    Raises:
        Unreadable: it is not that.
    """
    document = parse(text, integers_only=integers_only)
    if not isinstance(document, dict):
        raise Unreadable(f"holds a JSON {type(document).__name__} instead of an object")
    return document


def parse(text: bytes, *, integers_only: bool = False) -> Any:
    """A JSON value in which no key occurs twice, no text is half a surrogate pair, and nothing is nested too deeply.

    Args:
        text: UTF-8.
        integers_only: whether any number but a non-negative integer below 2^64 is refused.

    Raises:
        Unreadable: it is not that.
    """
    number: dict[str, Any] = {"parse_int": _natural, "parse_float": _refuse, "parse_constant": _refuse}
    if len(text) > LARGEST:
        raise Unreadable(f"is {len(text):,} bytes of JSON; at most {LARGEST:,} are read")
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, **(number if integers_only else {})
        )
    except RecursionError as error:
        raise Unreadable("is nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise Unreadable(f"is not valid JSON: {' '.join(str(error).split())[:200]}") from error
    if is_deeper(value):
        raise Unreadable("is nested too deeply")
    if b"\\ud" in text or b"\\uD" in text:
        _check_surrogates(value)
    return value


def parse_yaml(text: bytes) -> Any:
    """A YAML document of plain values, within the same bounds.

    Args:
        text: UTF-8.

    Raises:
        Unreadable: it is no YAML, is too large or nested too deeply, or has aliases, of which few lines make gigabytes.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise Unreadable(f"is {len(text):,} bytes of YAML; at most {LARGEST_YAML:,} are read")
    try:
        _check_events(yaml.parse(text.decode("utf-8")))
        value = yaml.safe_load(text.decode("utf-8"))
    except RecursionError as error:
        raise Unreadable("is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError, OverflowError) as error:
        raise Unreadable(f"is not YAML: {' '.join(str(error).split())[:300]}") from error
    return value


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


def listed(phrases: list[str], most: int = 5) -> str:
    """Some phrases, and how many more there are."""
    more = f"; and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + more


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


def is_deeper(value: Any, most: int = DEEPEST) -> bool:
    """Whether a JSON value has more lists and objects in each other than that."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [
            part
            for each in level
            if isinstance(each, (dict, list))
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return False
    return True


def _check_events(events: Iterator[Any]) -> None:
    """Refuse YAML with aliases or deep nesting at the first sign of it."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable("has aliases (*NAME); write out what they stand for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise Unreadable("is nested too deeply")


def _check_surrogates(value: Any) -> None:
    """Refuse half of a surrogate pair, which would be a crash wherever it is written."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unreadable(f"is not valid JSON: {error.reason}") from error


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20 or int(digits) >= 1 << 64:
        _refuse(digits)
    return int(digits)


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token[:40]} is no size")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:200]!r} occurs twice")
    return document
