"""Plain text from files: .txt as it is, .jsonl as the strings in its rows, each also as .gz."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..outside.documents import parse

TEXT = (".txt", ".txt.gz")
LINES = (".jsonl", ".jsonl.gz")
ALLOWED = "calibration text comes as .txt or .jsonl, each also as .gz"
PIECE = 1 << 16
"""Characters of plain text that are read at a time; cut at line ends."""


def check_text(source: str | Path) -> None:
    """Refuse, before anything is read, a file that is not there or is of another kind.

    Raises:
        DataError: with what is allowed.
    """
    path = Path(source)
    if not path.name.lower().endswith((*TEXT, *LINES)):
        raise DataError(f"{source} is neither; {ALLOWED}")
    if not path.is_file():
        raise DataError(f"there is no file {source}; {ALLOWED}")


def texts_of(source: str | Path | Iterable[str]) -> Iterator[str]:
    """The texts of a file, in pieces, or the given ones.

    Raises:
        DataError: no such file, a damaged one, or one of another kind.
    """
    if not isinstance(source, str | Path):
        yield from source
        return
    check_text(source)
    path = Path(source)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from rows_of(path, file) if path.name.lower().endswith(LINES) else pieces_of(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read ({error}); give UTF-8 text, {ALLOWED}") from error


def pieces_of(file: Iterable[str]) -> Iterator[str]:
    """Plain text, some lines at a time."""
    piece, size = [], 0
    for line in file:
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def rows_of(path: Path, file: Iterable[str]) -> Iterator[str]:
    """One text per line of JSON."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line.encode())
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON ({error})") from error
        text = row["text"] if isinstance(row, dict) and isinstance(row.get("text"), str) else "\n".join(strings_in(row))
        yield text + "\n"


def strings_in(row: Any) -> Iterator[str]:
    """All strings in a row, in order; the roles of a conversation are no text."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for key, value in row.items():
            if key != "role":
                yield from strings_in(value)
    elif isinstance(row, list):
        for value in row:
            yield from strings_in(value)
