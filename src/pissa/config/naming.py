"""Modules by name: which names a configuration means, and what is said of those that mean nothing or ask too much.

Strings alone: a model at hand and the mere headers of a checkpoint are held against a configuration in the same way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from ..errors import listed


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a module's name is meant: a string is one regular expression for whole names, a list holds names or
    name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def nothing_matches(missing: Sequence[str], endings: Sequence[str], where: str = "") -> str:
    """What is said of names of modules that match nothing.

    Args:
        missing: the names.
        endings: in which the model's linear layers end.
        where: the setting, unless it is target_modules.
    """
    close = [near for name in missing for near in _near(name, endings)]
    return (
        f"{where and f'{where}: '}no module matches {listed([repr(name) for name in missing])}; closest names: "
        f"{', '.join(dict.fromkeys(close)) or ', '.join(endings) or 'none, the model has no linear layer'}"
    )


def rank_too_large(low: Iterable[tuple[str, tuple[int, ...], int]]) -> str:
    """What is said of ranks above the smaller side of a weight.

    Args:
        low: name, shape and rank of each.
    """
    what = [f"{name} {shape}: {rank} > {min(shape)}" for name, shape, rank in low]
    return f"rank exceeds the smaller side of {listed(what)}; lower rank, or set rank_pattern for these"


def _near(name: str, endings: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name.rpartition(".")[2], endings, n=3, cutoff=0.4)
