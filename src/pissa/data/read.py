"""Reading examples from files and from the hub.

What flows where:

    read_examples (here): file or hub id -> rows with their places
    rows.py:              row -> Example (`conversation.py`), whatever the row's shape; messages by `messages.py`
    prompts.py:           Example -> the text that a model continues, under a prompt template
    chat_tokens.py:       Example -> input_ids and what is learned of them, under the tokenizer's chat template
    encode.py:            all examples -> input_ids and labels, and the collator that pads a batch of them

A file is read as bytes and split at line feeds only, so that other line separators inside a string break no row.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ..errors import DataError, MissingExtraError
from ..outside.documents import is_deeper, without_duplicates
from ..outside.hub import at_the_hub, why_unreachable
from .conversation import Example, RowError
from .rows import collect

GZIP_MAGIC, PARQUET_MAGIC, BYTE_ORDER_MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
LISTS = ("data", "rows", "examples", "instances")
"""Keys under which a JSON document may hold its rows."""
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
        source: a file of JSON (one object per line, a list of objects, or an object that holds such a list under
            "data"), also compressed by gzip, a parquet file, or the id of a data set on the hub. What exists as a file
            is taken as a file.
        split: of a data set on the hub; a file has no splits and is read whole.
        subset: of a data set on the hub that has several ("main" of "openai/gsm8k").

    Returns:
        One example per row, in order. Blank lines are no rows.

    Raises:
        DataError: no such file or data set, a file that is empty, damaged or of another kind, or rows that cannot
            be used: the message gives their number, and file and line of the first few.
        MissingExtraError: parquet or hub data without the packages of `pissa[train]`.
    """
    check_source(source)
    path, name = Path(source), str(source)
    return collect(file_rows(path) if path.exists() else _hub_rows(name, split, subset), name)


def check_source(source: str | Path) -> None:
    """Refuse, before anything is read, a folder and a file that is not there.

    Raises:
        DataError: with what is allowed; the id of a data set on the hub passes.
    """
    path, name = Path(source), str(source)
    if not name or path.is_dir():
        raise DataError(f"{name} is a folder; give one file ({ALLOWED})" if name else f"no data is given; {ALLOWED}")
    on_hub = isinstance(source, str) and HUB_ID.fullmatch(name) and not name.lower().endswith(FILE_ENDINGS)
    if not path.exists() and not on_hub:
        raise DataError(f"there is no file {name}; {ALLOWED}")
    if path.exists() and not path.is_file():
        raise DataError(f"{name} is no plain file, and one is read more than once; write what it gives into a file")


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a file; a row that is not JSON is the `RowError`.

    What the file holds decides how it is read, whatever its name ends in: gzip and parquet by their first bytes; JSON
    as one document (a list of rows, or an object that has them under one of LISTS) or as lines.

    Raises:
        DataError: a file that is damaged or of another kind.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(PARQUET_MAGIC))
        if start == PARQUET_MAGIC or name.lower().endswith(PARQUET):
            return _parquet_rows(path, name)
        return _json_rows(path, name, compressed=start.startswith(GZIP_MAGIC))
    except OSError as error:
        raise DataError(f"{name} cannot be read: {_one_line(error)}") from error


def _json_rows(path: Path, name: str, *, compressed: bool) -> Iterator[tuple[str, Any]]:
    try:
        if name.lower().endswith(".gz") and path.stat().st_size and not compressed:
            raise DataError(f"{name} cannot be read: it is not compressed by gzip, as its name says")
        with _open(path, compressed=compressed) as file:
            first = _first_line(file)
            if first and not name.lower().endswith((*LINES, *JSON)) and first[:1] not in (b"{", b"["):
                raise DataError(f"{name} is of a kind that is not read; {ALLOWED}")
            file.seek(0)
            document = _document(file, first, name)
            if document is not None:
                yield from document
            else:
                file.seek(0)
                yield from _lines(file, name)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read: {_one_line(error)}") from error


def _open(path: Path, *, compressed: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def _first_line(file: IO[bytes]) -> bytes:
    """The first line that says something, without what surrounds it."""
    for line in file:
        if found := line.removeprefix(BYTE_ORDER_MARK).strip():
            return found
    return b""


def _document(file: IO[bytes], first: bytes, name: str) -> Iterator[tuple[str, Any]] | None:
    """The rows of a file that is one JSON document; None for one of lines.

    Args:
        file: at its beginning.
        first: its first line that says something.
        name: of the file.

    Raises:
        DataError: a list that is damaged.
    """
    row = _parse(first)
    if isinstance(row, Mapping) and not any(isinstance(row.get(key), list) for key in LISTS):
        return None
    if not isinstance(row, RowError) and not isinstance(row, Mapping | list):
        return None
    if not isinstance(row, RowError) and sum(1 for line in file if line.removeprefix(BYTE_ORDER_MARK).strip()) > 1:
        return None
    if isinstance(row, RowError):
        if first[:1] not in (b"[", b"{"):
            return None
        row = _parse(file.read().removeprefix(BYTE_ORDER_MARK))
    if isinstance(row, RowError):
        if first[:1] == b"[" and not name.lower().endswith(LINES):
            raise DataError(f"{name} {row}")
        return None
    rows = row if isinstance(row, list) else _listed_in(row)
    return ((f"{name}: row {number}", held) for number, held in enumerate(rows, 1))


def _listed_in(document: Any) -> list[Any]:
    """The rows that an object holds under one of LISTS, unless it is a row itself."""
    if isinstance(document, Mapping):
        lists = [document[key] for key in LISTS if isinstance(document.get(key), list)]
        if len(lists) == 1 and all(isinstance(row, Mapping) for row in lists[0]):
            return lists[0]
    return [document]


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield f"{name}:{number}", _parse(line)


def _parse(text: bytes) -> Any:
    """The JSON value, or a `RowError` that says why there is none."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=without_duplicates)
        return RowError("is nested too deeply") if is_deeper(value) else value
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
        with at_the_hub():
            rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"there is no file {name}, and no data set of that id could be loaded from the hub "
            f"(split {split!r}, subset {subset!r}): {_one_line(error)}"
            + (f"; {reason}" if (reason := why_unreachable()) else "")
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
