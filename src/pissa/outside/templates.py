"""A tokenizer's chat template, which is a program that a stranger wrote, rendered within limits.

transformers renders it in Jinja's sandbox, from which it cannot reach anything. But it can loop for hours, recurse,
make gigabytes of text, or divide by zero. Here it has a time and a memory for one conversation, and whatever it raises
is one kind of error with one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from .limits import LimitError, bounded

SECONDS = 10.0
"""For one conversation; the longest template that is known takes milliseconds."""
MEMORY = 1 << 30
T = TypeVar("T")


class TemplateRefusedError(ValueError):
    """The template cannot be rendered, or not within its limits; the message says why on one line."""


class TemplateLimitError(TemplateRefusedError):
    """The template takes more than its time or memory, as it would for every other conversation."""


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, within limits.

    Args:
        tokenizer: whose template it is.
        messages: one conversation.
        options: passed on; `chat_template` for another template than the tokenizer's own.

    Returns:
        What `apply_chat_template` returns.

    Raises:
        TemplateRefusedError: as `within_limits`.
    """
    template = options.get("chat_template") or tokenizer.chat_template
    return within_limits(template, lambda: tokenizer.apply_chat_template(messages, **options))


def within_limits(template: Any, work: Callable[[], T]) -> T:
    """What some work gives that renders a template for one conversation or a few.

    Args:
        template: what is rendered: a text, or several by name.
        work: renders it.

    Raises:
        TemplateLimitError: it takes more than its time or memory.
        TemplateRefusedError: the template raises an error, or raises to a power.
    """
    try:
        for text in _texts(template):
            _check_powers(text)
        with bounded(SECONDS, MEMORY):
            return work()
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


@lru_cache(maxsize=64)
def _check_powers(text: str) -> None:
    """Refuse powers, one of which can keep the interpreter busy for ever; `**` before keyword arguments is none."""
    from jinja2 import Environment

    before = ""
    for _, kind, value in Environment().lex(text):
        if kind == "operator" and value == "**" and before not in ("(", ","):
            raise ValueError("it raises to a power (**), which no chat template needs")
        if kind != "whitespace":
            before = value
