"""Every way in which pissa says no.

A user's mistake raises one of these: one line that says what was given, what is allowed and what to do instead.
The command line turns them into exit code 2 without a traceback; whatever else escapes is our fault and exits with 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def listed(items: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """Offenders for a message, in one line: all of them, or the first `most` and how many more there are.

    Example:
        >>> listed("abcdefg")
        'a, b, c and 4 more'
    """
    names = [str(item) for item in items]
    if len(names) <= most + 2:
        return separator.join(names)
    return f"{separator.join(names[:most])} and {len(names) - most} more"


class PissaError(Exception):
    """Base of all errors that pissa raises on purpose: the user's input is wrong, and one line says how to mend it.

    Example:
        >>> from pissa import PissaConfig, PissaError
        >>> try:
        ...     PissaConfig(rank=0)
        ... except PissaError as error:
        ...     print(error)
        rank is 0; give a whole number of at least 1
    """


class ConfigError(PissaError, ValueError):
    """A setting, or a combination of settings, that cannot be right."""


class TargetError(PissaError, ValueError):
    """A module that was asked for and cannot be adapted; the message names every offender."""


class WeightError(PissaError, ValueError):
    """A weight whose values or shape rule out a decomposition."""


class CheckpointError(PissaError, ValueError):
    """A model or adapter on disk that is missing, incomplete or not what it says."""


class DataError(PissaError, ValueError):
    """Training or evaluation data that cannot be read; the message gives file and line."""


class TrainingError(PissaError, ArithmeticError):
    """A run that diverged; the message gives the step and the last good checkpoint."""


class OutputError(PissaError, OSError):
    """A result that could not be written; nothing half-written is left behind."""


class MissingExtraError(PissaError, ImportError):
    """A feature whose optional dependency is not installed; the message names the extra."""


class Interrupted(KeyboardInterrupt):
    """The user, or the machine, stopped the work; the message says what is saved and how to continue."""


@contextmanager
def extra(name: str, needs: str) -> Iterator[None]:
    """Import what an extra of pissa installs.

    Args:
        name: of the extra.
        needs: what needs which package, for the message.

    Raises:
        MissingExtraError: an import failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{needs}: pip install 'pissa[{name}]'") from error
