"""Regular expressions that a stranger wrote: how much work matching one can be, before it is matched.

Python's matcher backtracks. `(a+)+b` on forty letters takes longer than anybody waits, and the expressions in an
adapter's configuration are matched with the names of modules, by PEFT too. `work` gives an upper bound of the ways in
which an expression can match a text of some length:

    a character                 1
    one after the other         the product, over the orders of the ends of those without a bound
    alternatives                the sum
    a repeated character        at most as many as it may be repeated, plus 1
    a repeated group            if the group matches in one way only, the same; else the product, if it ends at all
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from .schema import short

try:
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as codes
    import sre_parse as parser

MOST = 100_000_000
"""Ways to match that may be tried: seconds."""
LONGEST = 1 << 20
"""Characters of an expression; those that name every layer of a large model are long."""


def work(expression: str, length: int) -> float:
    """An upper bound of the ways in which a regular expression can match a text.

    Args:
        expression: as `re` takes it.
        length: of the text.

    Raises:
        ValueError: it is no regular expression, or is longer than one is read.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression):,} characters; at most {LONGEST:,} are read")
    try:
        return _of_sequence(parser.parse(expression), length)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"it is no regular expression ({' '.join(str(error).split())[:100]})") from error


def wrong_patterns(expressions: Iterable[str], length: int) -> list[str]:
    """What is wrong with expressions that a stranger wrote, one phrase each.

    Args:
        expressions: as `re` takes them.
        length: of the longest text that they are matched with.
    """
    wrong = []
    for expression in expressions:
        try:
            if work(expression, length) > MOST:
                wrong.append(f"the pattern {short(expression)} could take for ever to match")
        except ValueError as error:
            wrong.append(f"the pattern {short(expression)} cannot be used: {error}")
    return wrong


def _of_sequence(items: Any, length: int) -> float:
    ways, open_ended = 1.0, 0
    for code, argument in items:
        found = _of_item(code, argument, length)
        ways *= found
        open_ended += found > length > 0
        if ways > 1e30:
            return math.inf
    # where one ends the next begins, so their ends are in order
    return max(ways / math.factorial(open_ended), 1.0)


def _of_item(code: Any, argument: Any, length: int) -> float:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", None)):
        least, most, inner = argument
        return _of_repeat(int(least), int(most), inner, length)
    if code is codes.SUBPATTERN:
        return _of_sequence(argument[-1], length)
    if code is codes.BRANCH:
        return sum(_of_sequence(each, length) for each in argument[1])
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _of_sequence(argument[1], length)
    if code is getattr(codes, "ATOMIC_GROUP", None):
        return _of_sequence(argument, length)
    if code is codes.GROUPREF_EXISTS:
        return sum(_of_sequence(each, length) for each in argument[1:] if each is not None)
    return 1.0


def _of_repeat(least: int, most: int, inner: Any, length: int) -> float:
    ways = _of_sequence(inner, length)
    shortest = inner.getwidth()[0]
    times = min(most, length // shortest) if shortest else min(most, length)
    choices = max(times - least, 0) + 1
    if ways <= 1:
        return choices
    return math.inf if times * math.log(ways) > 40 else choices * ways**times
