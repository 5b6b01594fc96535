"""Plain text from files: .txt as it is, also as .gz; of a file of rows the strings in them, however it holds them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .conversation import RowError
from .read import JSON, LINES, PARQUET, file_rows

TEXT = (".txt", ".txt.gz")
ROWS = (*LINES, *JSON, *PARQUET)
ALLOWED = "calibration text comes as .txt, or as rows in .jsonl or .json, each also as .gz, or .parquet"
UTF8 = "utf-8-sig"
"""With or without a byte order mark."""
PIECE = 1 << 16
"""Characters of plain text that are read at a time; cut at line ends."""


def check_text(source: str | Path) -> None:
    """Refuse, before anything is read, a file that is not there or is of another kind.

    Raises:
        DataError: with what is allowed.
    """
    path = Path(source)
    if not path.name.lower().endswith((*TEXT, *ROWS)):
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
    if path.name.lower().endswith(ROWS):
        yield from texts_in(path)
        return
    try:
        with gzip.open(path, "rt", encoding=UTF8) if path.suffix == ".gz" else path.open(encoding=UTF8) as file:
            yield from pieces_of(file)
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


def texts_in(path: Path) -> Iterator[str]:
    """One text of each row of a file."""
    for where, row in file_rows(path):
        if isinstance(row, RowError):
            raise DataError(f"{where} {row}")
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
