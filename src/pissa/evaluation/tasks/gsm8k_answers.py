"""The final number of a worked solution, as an exact value.

Where a solution states its answer is marked, by "The answer is: N" (MetaMath, and our own problems) or
"#### N" (GSM8K); the last one counts, as in the published evaluations. The rules, in order:

1. The last marker decides, whichever of the two it is. "The answer is" may go without colon and in any case.
2. The number must follow the marker directly; only a currency sign, Markdown emphasis, LaTeX's `$ \\( \\boxed{ \\text{`
   or an opening bracket may stand between.
3. What follows on the same line may be a unit, a percent sign (a unit too: 50 % is 50) or punctuation, but nothing
   that makes the number part of something larger: "5 + 3", "5-6", "5:30", "1,2", "2^10", "5π", "5 or 6" have no
   value here.

No marker, or no such number: there is no answer (None). No other number of the text is ever taken in its place.
"""

from __future__ import annotations

import re
from fractions import Fraction

MARKER = re.compile(r"the answer is\b\s*:?|(?<!#)####(?!#)", re.IGNORECASE)

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"""
    (?:[\s*_$€£¥₹({{\[]|\\[(\[$]|\\boxed|\\text)*  # what may stand before the sign
    (?P<sign>[-+−]?)[$€£¥₹]?
    (?:
        \\[dt]?frac\{{(?P<top>{_UNSIGNED})\}}\{{(?P<bottom>{_UNSIGNED})\}}
      | (?:(?P<whole>[0-9]+)[ ](?=[0-9]+/[0-9]))?  # the 1 of the mixed number 1 3/4
        (?P<value>{_UNSIGNED})
        (?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})|[ ]?/[ ]?(?P<divisor>{_UNSIGNED}))?
    )
    (?!                                            # what may not come next
        [\d.,]*\d                                  # 1,2,3   1.2.3   1,23
      | [ \t]*[,;][ \t]*[-+−]?\d                   # 5, 6
      | [ \t]*(?:\*\*|[-+−–*×x·÷/:^=~])[ \t]*[-+−$(\\]?\d  # 5 + 3   5-6   5:30   2^10
      | [ \t]+(?:(?:and|or|to)[ \t]+[-+−$]?)?\d    # 5 6   5 or 6
      | [eE][-+]?\d                                # an exponent too large to be meant
      | \^
      | [ \t]*(?:[²³¹¼-¾⁰-₟⅐-⅟π√∞]|\\(?:pi|sqrt|cdot|times|div|pm|frac))
    )
    """,
    re.VERBOSE,
)
# No answer is longer; looking no further also bounds the work on text made of digits.
LONGEST = 200


def extract_answer(text: str) -> Fraction | None:
    """The value that a worked solution states after its last marker.

    Args:
        text: a solution that ends in "The answer is: N" or "#### N".

    Returns:
        The exact value, or None where there is no marker or no number that follows it; see the module's rules.
    """
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    start = markers[-1].end()
    number = _NUMBER.match(text[start : start + LONGEST])
    return None if number is None or number.end() == LONGEST else _value(number)


def same_answer(a: Fraction | None, b: Fraction | None) -> bool:
    """Whether two answers are the same number. An answer that is missing equals nothing, not even another such one."""
    return a is not None and a == b


def _value(number: re.Match[str]) -> Fraction | None:
    """The exact value of a matched number; None for a division by zero."""
    top, bottom = number["top"] or number["value"], number["bottom"] or number["divisor"] or "1"
    divisor = _exact(bottom)
    if divisor == 0:
        return None
    value = _exact(top) / divisor * Fraction(10) ** int(number["exponent"] or 0)
    value += int(number["whole"] or 0)
    return -value if number["sign"] in ("-", "−") else value


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
