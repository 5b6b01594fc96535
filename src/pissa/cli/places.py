"""Paths that a command line names, looked at before anything heavy is imported.

The rooms look at them again, and at what lies in them; here a wrong one is said at once.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.disk.write import check_writable
from ..checkpoint.source.names import check_adapter_name, check_model_name
from ..config.settings import did_you_mean
from ..data.read import check_source
from ..data.text_files import check_text
from ..errors import ConfigError, DataError

__all__ = [
    "check_adapter_name",
    "check_choice",
    "check_file",
    "check_model_name",
    "check_source",
    "check_text",
    "check_writable",
]


def check_file(path: str | Path, flag: str) -> None:
    """Refuse what is no file.

    Raises:
        DataError: naming the flag.
    """
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; {flag} takes one file")
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}; {flag} takes a local file")


def check_choice(flag: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of a flag's.

    Raises:
        ConfigError: naming what is allowed.
    """
    if value is not None and value not in allowed:
        raise ConfigError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}{did_you_mean(value, allowed)}")
