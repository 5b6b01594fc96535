r"""Final answers of the MATH data set: reading them, and telling whether two are the same.

Read: what stands in the last `\boxed{…}`, or, where "The answer is: …" comes later, the rest of that line.

The same, conservatively (no algebra is done: x + 1 and 1 + x differ):

    numbers        equal values: 0.5, \frac12, 1/2, \dfrac{1}{2}; 1,000 and 1000; 1\frac{1}{2} and 3/2
    tuples,        the same brackets, equal members in order
      intervals
    sets, bare     equal members in any order: "\{1,2\}", "1, 2" (solutions "separated by commas")
      lists
    words          letter for letter but for case: \text{Even} and even; \text{(A)} and A
    anything else  letter for letter, after what only changes the look is taken away: spaces, \left and \right, single
                   braces (x^{2}), a variable in front (x = 5), $, %, degrees, a unit at the end (5\text{ cm}^2, 5 cm)
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Any

STATED = re.compile(r"the answer is\b\s*:?[ \t]*([^\n]*)", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
LONGEST = 400
"""Characters of an answer; what is longer is none."""

_LOOK = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigg?|Bigg?)(?![a-zA-Z])|(?<!\\)\\[,;:]|~|\\quad|\\qquad"
    r"|\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?%|\\\$"
)
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\s*\\(?:text|textrm|mbox|mathrm)\s*\{[^{}\d]*\}(?:\s*\^\s*\{?[23]\}?)?\s*$")
_WORD = re.compile(r"(?<=\d)\s+[a-zA-Z]{2,}\.?\s*$")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_PLAIN = re.compile(rf"([-+]?)({_NUMBER})")
_MIXED = re.compile(r"([-+]?)(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\s)(\d+)\s*/\s*(\d+))")
_QUOTIENT = re.compile(rf"([-+]?)(?:\\frac\{{([-+]?)({_NUMBER})\}}\{{([-+]?)({_NUMBER})\}}|({_NUMBER})/({_NUMBER}))")
_OPEN, _CLOSE = {"(": ")", "[": "]", "\\{": "\\}"}, (")", "]", "\\}")


def final_answer(solution: str) -> str | None:
    """The answer that a solution states, as it is written; None where it states none."""
    boxes = list(BOX.finditer(solution))
    stated = list(STATED.finditer(solution))
    if stated and (not boxes or boxes[-1].start() < stated[-1].start()):
        found = stated[-1][1]
        return final_answer(found) if BOX.search(found) else _kept(found.rstrip().rstrip(".").strip())
    if not boxes:
        return None
    return _kept(_group(solution, boxes[-1].end()))


def same_expression(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same; one that is missing equals nothing."""
    return a is not None and b is not None and canonical(a) == canonical(b)


def canonical(answer: str) -> Any:
    """An answer in a form in which equal answers are equal objects."""
    text = _plain(answer)
    number = _number(text)
    if number is not None:
        return number
    inside = _bracketed(text)
    if inside is not None:
        opening, content, closing = inside
        members = [canonical(part) for part in _parts(content)]
        if opening == "\\{":
            return "set", frozenset(Counter(members).items())
        if len(members) > 1:
            return opening, *members, closing
    members = _parts(text)
    if len(members) > 1:
        return "set", frozenset(Counter(canonical(part) for part in members).items())
    return _letters(text)


def _kept(answer: str) -> str | None:
    return answer.strip() if 0 < len(answer.strip()) <= LONGEST else None


def _group(text: str, start: int) -> str:
    """What a command takes at `start`: a group in balanced braces, or else one character; nothing where it is open."""
    if text[start : start + 1] != "{":
        return text[start : start + 1]
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
    return ""


def _plain(answer: str) -> str:
    """Without what only changes the look, and without a unit."""
    text = answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
            text = text[len(opening) : len(text) - len(closing)].strip()
    text = (
        _LOOK.sub(" ", re.sub(r"(?<!\\)\\ ", " ", text).replace("\\!", "").replace("{,}", ","))
        .replace("−", "-")
        .replace("$", " ")
    )
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:l|r)brace(?![a-zA-Z])", lambda m: "\\{" if m[0][1] == "l" else "\\}", text)
    whole = _TEXT.fullmatch(text.strip())
    text = whole[1] if whole else _WORD.sub("", _UNIT.sub("", text))
    text = text.strip().rstrip(".,").strip()
    text = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\s*(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[a-zA-Z](?:_?\w)?\s*(?:=(?!.*=)|\\in(?![a-zA-Z]))\s*", "", text)
    return text.strip()


def _number(text: str) -> Fraction | None:
    """The value of one number; None for anything else."""
    if found := _PLAIN.fullmatch(text):
        return _signed(found[1], _exact(found[2]))
    if found := _MIXED.fullmatch(text):
        top, bottom = int(found[3] or found[5]), int(found[4] or found[6])
        return _signed(found[1], int(found[2]) + Fraction(top, bottom)) if bottom else None
    if found := _QUOTIENT.fullmatch(re.sub(r"\s+", "", text) if not re.search(r"\d\s+\d", text) else text):
        top, bottom = _exact(found[3] or found[6]), _exact(found[5] or found[7])
        if bottom == 0:
            return None
        return _signed(found[1], _signed(found[2], _signed(found[4], top / bottom)))
    return None


def _signed(sign: str | None, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip(".") or "0")


def _bracketed(text: str) -> tuple[str, str, str] | None:
    """Opening, content and closing of a text that is one bracketed group; ( may close with ] and [ with )."""
    opening = next((sign for sign in _OPEN if text.startswith(sign)), None)
    closing = next((sign for sign in _CLOSE if text.endswith(sign)), None)
    if opening is None or closing is None or (opening == "\\{") != (closing == "\\}"):
        return None
    content = text[len(opening) : len(text) - len(closing)]
    return (opening, content, closing) if _balanced(content) else None


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _parts(text: str) -> list[str]:
    """The members of a list: split at the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for position, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return parts if all(part.strip() for part in parts) else [text]


def _letters(text: str) -> str:
    """One spelling of an expression that is compared letter for letter."""
    bare = _TEXT.sub(r"\1", text).strip()
    if re.fullmatch(r"yes|no|[a-z .'-]{3,}", bare, re.IGNORECASE):
        return " ".join(bare.split()).casefold()
    if re.fullmatch(r"\([A-Z]\)", bare):
        return bare[1]
    bare = re.sub(r"\s+", "", re.sub(r"(?<=\d)\s+(?=\d)", "␣", bare))
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", bare)
