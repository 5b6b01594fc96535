"""Reading examples from files and from the hub.

What flows where:

    read_examples (here): file or hub id -> rows with their places
    rows.py:              row -> Example, the messages of a conversation, whatever the row's shape
    prompts.py:           Example -> pieces of text, each learned or not, under a prompt template
    encode.py:            pieces -> input_ids and labels, and the collator that pads a batch of them

A file is read as bytes and split at line feeds only, so that other line separators inside a string break no row.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ..errors import DataError, MissingExtraError
from .rows import Example, RowError, collect

LINES = (".jsonl", ".jsonl.gz")
JSON = (".json", ".json.gz")
PARQUET = (".parquet",)
ALLOWED = "allowed: .jsonl, .json (each also as .gz), .parquet, or the id of a data set on the hub"
# Endings that no hub id has: a name with one of them is a file, there or missing.
FILE_ENDINGS = (
    *LINES,
    *JSON,
    *PARQUET,
    ".gz",
    ".csv",
    ".tsv",
    ".txt",
    ".zip",
    ".arrow",
    ".yaml",
    ".xz",
    ".zst",
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def read_examples(source: str | Path, *, split: str = "train", subset: str | None = None) -> list[Example]:
    """Read a data set; see `rows.py` for the shapes that its rows may have.

    Args:
        source: a .jsonl file (one object per line), a .json file (a list of objects, or lines), either also as .gz,
            a .parquet file, or the id of a data set on the hub. What exists as a file is taken as a file.
        split: of a data set on the hub; a file has no splits and is read whole.
        subset: of a data set on the hub that has several ("main" of "openai/gsm8k").

    Returns:
        One example per row, in order. Blank lines are no rows.

    Raises:
        DataError: no such file or data set, a file that is empty, damaged or of another kind, or rows that cannot
            be used: the message gives their number, and file and line of the first few.
        MissingExtraError: parquet or hub data without the packages of `pissa[train]`.
    """
    path = Path(source)
    name = str(source)
    if path.is_dir():
        raise DataError(f"{name} is a folder; give one file ({ALLOWED})")
    ending = name.lower()
    if not path.exists():
        if isinstance(source, str) and HUB_ID.fullmatch(name) and not ending.endswith(FILE_ENDINGS):
            return collect(_hub_rows(name, split, subset), name)
        raise DataError(f"there is no file {name}; {ALLOWED}")
    return collect(file_rows(path), name)


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a .jsonl, .json or .parquet file; a row that is not JSON is the `RowError`.

    Raises:
        DataError: a file that is damaged or of another kind.
    """
    name = str(path)
    ending = name.lower()
    if ending.endswith(PARQUET):
        return _parquet_rows(path, name)
    if ending.endswith((*LINES, *JSON)):
        return _json_rows(path, name, may_be_list=ending.endswith(JSON))
    raise DataError(f"{name} is of a kind that is not read; {ALLOWED}")


def _json_rows(path: Path, name: str, *, may_be_list: bool) -> Iterator[tuple[str, Any]]:
    try:
        with _open(path) as file:
            if may_be_list and _starts_a_list(file):
                yield from _listed_rows(file, name)
            else:
                yield from _lines(file, name)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read: {_one_line(error)}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _starts_a_list(file: IO[bytes]) -> bool:
    """Whether the first character that says something opens a list; the file is wound back."""
    first = b""
    for line in file:
        first = line.removeprefix(b"\xef\xbb\xbf").strip()[:1]
        if first:
            break
    file.seek(0)
    return first == b"["


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield f"{name}:{number}", _parse(line)


def _listed_rows(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    rows = _parse(file.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(rows, RowError):
        raise DataError(f"{name} {rows}")
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", row


def _parse(text: bytes) -> Any:
    """The JSON value, or a `RowError` that says why there is none."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return RowError(f"is not JSON ({error.msg}, {line}column {error.colno})")
    except (ValueError, RecursionError) as error:
        return RowError(f"is not JSON that can be read ({_one_line(error)})")


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    parquet = _extra("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot be read as parquet: {_one_line(error)}") from error


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    datasets = _extra("datasets")
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"there is no file {name}, and no data set of that id could be loaded from the hub "
            f"(split {split!r}, subset {subset!r}): {_one_line(error)}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} ({split}): row {number}", row


def _extra(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"this data needs {package}: pip install 'pissa[train]'") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
