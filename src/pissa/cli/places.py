"""Paths that a command line names, looked at before anything heavy is imported.

The rooms look at them again, and at what lies in them; here a wrong one is said at once.
"""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path

from ..checkpoint.disk.resumable import Resumable
from ..checkpoint.disk.write import check_writable
from ..checkpoint.source.look import check_adapter, check_model, check_subject
from ..checkpoint.source.outline import check_outline
from ..config.settings import did_you_mean
from ..data.read import check_source, file_rows
from ..data.rows import collect
from ..data.text_files import check_text
from ..errors import ConfigError, DataError
from ..outside.hub import check_data_set

__all__ = [
    "check_adapter",
    "check_choice",
    "check_file",
    "check_model",
    "check_outline",
    "check_output",
    "check_rows",
    "check_subject",
    "check_text",
    "check_writable",
]
FIRST = 100
"""How many rows are looked at."""


def check_file(path: str | Path, flag: str) -> None:
    """Refuse what is no file.

    Raises:
        DataError: naming the flag.
    """
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; {flag} takes one file")
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}; {flag} takes a local file")


def check_rows(source: str) -> None:
    """Refuse data that is not there, and a file whose first rows cannot be used.

    Raises:
        DataError: with what is allowed.
    """
    check_source(source)
    path = Path(source)
    if not path.exists():
        check_data_set(source)
    elif not path.name.lower().endswith(".parquet"):
        with warnings.catch_warnings():  # what there is to say of all rows is said when all are read
            warnings.simplefilter("ignore")
            collect(islice(file_rows(path), FIRST), source)


def check_output(out: Path, record: str, noun: str) -> None:
    """Refuse a directory that cannot be written, or that holds something else than the run that it is to hold.

    Args:
        out: the directory.
        record: the file in it that only such a run has; its room reads it.
        noun: what such a run is called.

    Raises:
        OutputError: naming what is in the way.
    """
    check_writable(out)
    file = out / record
    if not file.is_file():
        work = file.parent if file.parent != out else None
        Resumable(out, file, noun, "", dict, work).read()


def check_choice(flag: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of a flag's.

    Raises:
        ConfigError: naming what is allowed.
    """
    if value is not None and value not in allowed:
        raise ConfigError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}{did_you_mean(value, allowed)}")
