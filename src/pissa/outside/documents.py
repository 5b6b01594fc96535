"""JSON that comes from outside, read within bounds and held against a dataclass before anybody uses it.

A file in a directory that somebody hands over may be a gigabyte, may be nested a million deep, may not be text, and may
have a list where a number is expected. `parse` bounds size and depth and accepts one reading of JSON only;
`schema.wrong_fields` compares what was read with the fields of a dataclass; `read_document` does both for a file and
turns whatever is wrong into one line.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, PissaError, listed
from .schema import wrong_fields

LARGEST = 1 << 25
"""Bytes of JSON that are parsed at most: parsing takes up to 24 times as much memory. 32 MiB name 200,000 tensors."""
LARGEST_YAML = 1 << 18
"""Bytes of YAML: a file of settings, and slow to parse."""
DEEPEST = 100
"""Levels of lists and objects in each other."""


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
            raise Unreadable(f"is not what it should be: {listed(wrong, separator='; ')}")
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
            text.decode("utf-8"), object_pairs_hook=without_duplicates, **(number if integers_only else {})
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


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `json.loads` calls for it; a key that occurs twice is a ValueError."""
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:200]!r} occurs twice")
    return document
