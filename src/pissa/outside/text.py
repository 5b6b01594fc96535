"""Names and sentences that a stranger wrote, on their way out: to a terminal, into Markdown, into Python.

A directory, a module, a base or a judge may be called anything: what moves the cursor, ends a code block, a string or a
heading. Ordinary text leaves every one of these functions as it came.
"""

from __future__ import annotations

import re
import unicodedata

KEPT_ON_TERMINALS = "\n\t"


def for_terminal(text: str) -> str:
    """Text in which every character that steers a terminal, or turns the order of letters round, is spelled out.

    Line ends and tabs stay: what is printed has lines.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in KEPT_ON_TERMINALS or _is_shown(letter) else _escaped(letter) for letter in text)


def on_one_line(text: str) -> str:
    """As `for_terminal`, with runs of blanks and line ends as one blank."""
    return for_terminal(" ".join(text.split()))


def in_code(text: str) -> str:
    """Markdown's inline code with just this text in it, whatever backticks it has."""
    text = on_one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    if not longest:
        return f"`{text}`"
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def in_python(text: str) -> str:
    """A string literal of Python, in double quotes."""
    return '"' + "".join(_in_literal(letter) for letter in text) + '"'


def in_markdown(text: str) -> str:
    """Text as it stands in a paragraph or a cell of a table of Markdown: no markup, no HTML, no other line."""
    # an underscore within a word is a letter
    return re.sub(r"([\\`*{}\[\]<>#|!~&$]|(?<!\w)_|_(?!\w))", r"\\\1", on_one_line(text))


def _is_shown(letter: str) -> bool:
    return unicodedata.category(letter)[0] != "C" and letter not in "\u2028\u2029"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def _in_literal(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if _is_shown(letter) else _escaped(letter)
