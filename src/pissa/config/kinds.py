"""The kinds of settings: types with what is allowed of them, and how flags and YAML write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from .settings import Rule, is_number

LARGEST_ALPHA = 1e30
ALL_LINEAR = "all-linear"
PLAIN_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
PAIR = re.compile(r"\s*(?P<name>[^\s].*?)\s*=\s*(?P<value>[\w.+-]+)\s*(?:,|$)")


def module_names(given: Any) -> Any:
    """Modules as they are named in flags, YAML and recipes alike.

    Args:
        given: "all-linear"; a plain name (`q_proj`, `self_attn.q_proj`), which means every module whose name ends so;
            several, separated by commas; anything else is one regular expression, which matches whole names. A list
            holds plain names.

    Returns:
        A tuple of name endings; or "all-linear", or the regular expression.
    """
    if isinstance(given, list):
        return tuple(given)
    if not isinstance(given, str) or given.strip() == ALL_LINEAR:
        return given.strip() if isinstance(given, str) else given
    names = listed(given)
    return names if names and all(PLAIN_NAME.fullmatch(name) for name in names) else given


def listed(given: Any) -> Any:
    """The parts of a text between commas, as a tuple; a list as a tuple; anything else as it is."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return tuple(given) if isinstance(given, list) else given


def pattern(given: Any) -> Any:
    """Numbers by module, of text such as "q_proj=8,v_proj=4"; a name may be a regular expression with commas."""
    pairs = _pairs(given)
    if pairs is None:
        return given
    try:
        return {name: int(value) if value.isdecimal() else float(value) for name, value in pairs.items()}
    except ValueError:
        return given


def token_ids(given: Any) -> Any:
    """Token ids of text: "3,7", or by embedding "embed_tokens=3+7"; lists become tuples."""
    if isinstance(given, Mapping):
        return {name: tuple(ids) if isinstance(ids, list) else ids for name, ids in given.items()}
    parts = listed(given)
    if isinstance(given, str) and all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    pairs = _pairs(given) or {}
    if pairs and all(re.fullmatch(r"\d+(\+\d+)*", ids) for ids in pairs.values()):
        return {name: tuple(map(int, ids.split("+"))) for name, ids in pairs.items()}
    return given if isinstance(given, str) else parts


def _pairs(given: Any) -> dict[str, str] | None:
    """The `name=value` pairs of a text, if it is made of such alone and no name comes twice."""
    if not isinstance(given, str):
        return None
    found = list(PAIR.finditer(given))
    whole = "".join(match[0] for match in found) == given
    pairs = {match["name"]: match["value"] for match in found}
    return pairs if whole and len(pairs) == len(found) else None


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or all(isinstance(name, str) for name in value)


def _are_numbers_by_name(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and is_number(number) for name, number in value.items())


def _are_token_ids(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_listing(ids) for name, ids in value.items())
    return _is_listing(value)


def _is_listing(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


Count = Annotated[int, Rule("give a whole number of at least 1", lambda value: value >= 1)]
CountFromTwo = Annotated[int, Rule("give a whole number of at least 2", lambda value: value >= 2)]
CountFromZero = Annotated[int, Rule("give a whole number of at least 0", lambda value: value >= 0)]
Seed = Annotated[int, Rule("give a whole number from 0 to 2^32 − 1", lambda value: 0 <= value < 2**32)]
Positive = Annotated[float, Rule("give a positive number", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Rule("give 0 or a positive number", lambda value: 0 <= value < math.inf)]
AtLeastOne = Annotated[float, Rule("give a number of at least 1", lambda value: 1 <= value < math.inf)]
Share = Annotated[float, Rule("allowed: 0 to 1", lambda value: 0 <= value <= 1)]
ShareBelowOne = Annotated[float, Rule("allowed: 0 up to, not including, 1", lambda value: 0 <= value < 1)]
ShareAboveZero = Annotated[float, Rule("allowed: above 0, up to 1", lambda value: 0 < value <= 1)]
Alpha = Annotated[
    float,
    Rule("give a positive number, or leave it out for a scale of 1", lambda value: 0 < value < LARGEST_ALPHA),
]
Name = Annotated[str, Rule("give a name", bool, form="NAME")]
File = Annotated[str, Rule("give the path of a file", bool, form="FILE")]
Modules = Annotated[
    str | tuple[str, ...] | list[str],
    Rule("give a name, a list of names or a regular expression", _are_names, module_names, "NAMES"),
]
Names = Annotated[tuple[str, ...] | list[str], Rule("give a list of names", _are_names, listed, "NAMES")]
RankPattern = Annotated[
    Mapping[str, int],
    Rule(
        "give q_proj=8,v_proj=4, or in YAML lines of the form `module: number`",
        _are_numbers_by_name, pattern, "PAIRS",
    ),
]  # fmt: skip
AlphaPattern = Annotated[
    Mapping[str, float],
    Rule(
        "give q_proj=8,v_proj=4, or in YAML lines of the form `module: number`",
        _are_numbers_by_name, pattern, "PAIRS",
    ),
]  # fmt: skip
TokenIds = Annotated[
    Sequence[int] | Mapping[str, Sequence[int]],
    Rule(
        "give token ids separated by commas (3,7), those of one embedding as embed_tokens=3+7, or in YAML lines of "
        "the form `module: [ids]`",
        _are_token_ids, token_ids, "IDS",
    ),
]  # fmt: skip
