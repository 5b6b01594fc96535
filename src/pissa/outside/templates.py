"""A tokenizer's chat template, which is a program that a stranger wrote, rendered within limits.

transformers renders it in Jinja's sandbox, from which it cannot reach anything. But it can loop for hours, recurse,
make gigabytes of text, or divide by zero. Here it has a time, a memory and a length for one conversation, and a pace
for many; whatever it raises is one kind of error with one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .limits import LimitError, bounded
from .schema import short

SECONDS = 10.0
"""For one conversation; the longest template that is known takes milliseconds."""
MEMORY = 1 << 30
PACE, READING, PATIENCE = 0.25, 1e-5, 15.0
"""Seconds for a conversation, and for each of its characters, on average, once so many were spent on one template."""
BITS, DIGITS = 100_000, 300
"""Of a number that is multiplied or divided, and to which one is rounded."""
LONGEST, TIMES = 1 << 18, 16
"""Characters, or tokens, that a template may write, and how many more for each character of the conversation."""
_spent: dict[int, tuple[int, float, float]] = {}
"""Hash of a template -> how often it was rendered, in how many seconds, and how many it should have taken at most."""
T = TypeVar("T")


class TemplateRefusedError(ValueError):
    """The template cannot be rendered, or not within its limits; the message says why on one line."""


class TemplateLimitError(TemplateRefusedError):
    """The template takes more than its time or memory, as it would for every other conversation."""


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], /, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, within limits.

    Args:
        tokenizer: whose template it is.
        messages: one conversation.
        options: passed on; `chat_template` for another template than the tokenizer's own.

    Returns:
        What `apply_chat_template` returns.

    Raises:
        TemplateLimitError: what it writes is out of all proportion to the conversation.
        TemplateRefusedError: as `within_limits`.
    """
    template = options.get("chat_template") or tokenizer.chat_template
    read = len(str((messages, options)))
    found = within_limits(template, lambda: tokenizer.apply_chat_template(messages, **options), read)
    written = len(found if isinstance(found, str) else found["input_ids"])
    if written > LONGEST + TIMES * read:
        raise TemplateLimitError(f"it writes {written:,} characters or tokens for one conversation")
    return found


def within_limits(template: Any, work: Callable[[], T], read: int = 0) -> T:
    """What some work gives that renders a template for one conversation or a few.

    Args:
        template: what is rendered: a text, or several by name.
        work: renders it.
        read: characters of the conversation.

    Raises:
        TemplateLimitError: it takes more than its time or memory, or too long again and again.
        TemplateRefusedError: the template raises an error, or computes with enormous numbers.
    """
    texts = tuple(_texts(template))
    count, spent, granted = _spent.get(hash(texts), (0, 0.0, 0.0))
    if spent > max(PATIENCE, granted):
        raise TemplateLimitError(f"it takes {spent / count:.1f} s on average for one conversation")
    try:
        start = time.monotonic()
        with _small_numbers(), bounded(SECONDS, MEMORY):
            found = work()
        _spent[hash(texts)] = count + 1, spent + time.monotonic() - start, granted + PACE + READING * read
        return found
    except LimitError as error:
        raise TemplateLimitError(f"{error} for one conversation") from error
    except Exception as error:  # a template can raise whatever an expression can
        words = " ".join(str(error).split())[:300]
        raise TemplateRefusedError(words or type(error).__name__) from error


def _texts(template: Any) -> Iterator[str]:
    """The text of a template, or of several by name."""
    if isinstance(template, str):
        yield template
    elif isinstance(template, dict):
        yield from (text for text in template.values() if isinstance(text, str))


@contextmanager
def _small_numbers() -> Iterator[None]:
    """Have Jinja compile templates such that no number in them becomes so large that one operation takes for ever."""
    from jinja2.filters import FILTERS
    from jinja2.sandbox import SandboxedEnvironment as Sandbox

    before = Sandbox.intercepted_binops, Sandbox.default_binop_table, FILTERS["round"]
    bounded_ones = {symbol: _of_small_numbers(symbol, before[1][symbol]) for symbol in ("*", "**", "//", "%")}
    Sandbox.intercepted_binops = before[0] | bounded_ones.keys()
    Sandbox.default_binop_table = {**before[1], **bounded_ones}
    FILTERS["round"] = _round
    try:
        yield
    finally:
        Sandbox.intercepted_binops, Sandbox.default_binop_table, FILTERS["round"] = before


def _of_small_numbers(symbol: str, operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if symbol == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise ValueError(f"it computes with numbers of more than {BITS:,} bits, which no chat template needs")
        return operation(left, right)

    return checked


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    """Jinja's filter, which raises ten to the power of what it is given."""
    from jinja2.filters import do_round

    if abs(precision) > DIGITS:
        raise ValueError(f"it rounds to {short(precision)} digits, which no chat template needs")
    return do_round(value, precision, method)
