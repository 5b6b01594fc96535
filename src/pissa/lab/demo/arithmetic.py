"""Arithmetic word problems with worked solutions: data that needs no download and whose answers are known.

A problem's identity is its template and the numbers in its question. No problem occurs twice, and the held-out
problems share none with the training ones; the last templates occur only among the held-out problems, so that
carrying over to other numbers and carrying over to another kind of problem can be told apart.

Every draw goes through `random.Random(seed).random()`, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import ConfigError
from .problem_templates import TRAINED, UNSEEN, ProblemTemplate

# fmt: off
NAMES = (
    "Ana", "Ben", "Chen", "Dana", "Emil", "Farah", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mateo", "Nadia",
    "Omar", "Priya", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Viktor", "Wanda", "Yusuf",
)
THINGS = (
    "apples", "pencils", "stickers", "marbles", "books", "cards", "shells", "buttons", "coins", "stamps", "beads",
    "balloons", "oranges", "candles",
)
# fmt: on
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
# Above this share of a template's number combinations, drawing a new one would take long.
USABLE_SHARE = 0.5


def make_problems(seed: int, train: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out problems, the same for the same arguments on every machine.

    The held-out problems do not depend on `train`. Templates occur equally often, up to one.

    Args:
        seed: of all draws.
        train: number of training rows, from the templates in `TRAINED`.
        held_out: number of held-out rows, from all templates.

    Returns:
        Training rows {"instruction", "output", "template"}, and held-out rows that also have "seen_template": whether
        the template occurs in training. Outputs end in "The answer is: N", N a positive integer.

    Raises:
        ConfigError: a negative number of rows, or more rows than there are problems.
    """
    _check_counts(train, held_out)
    rng = random.Random(seed)
    used: set[tuple[str, ...]] = set()
    held_out_rows = [
        {**_new_row(template, rng, used), "seen_template": template in TRAINED}
        for template in _balanced((*TRAINED, *UNSEEN), held_out, rng)
    ]
    return [_new_row(template, rng, used) for template in _balanced(TRAINED, train, rng)], held_out_rows


def draw_problems(templates: Sequence[ProblemTemplate], count: int, seed: int) -> list[dict[str, Any]]:
    """Problems of some kinds alone, no two alike.

    Args:
        templates: the kinds, each equally often up to one.
        count: how many problems.
        seed: of all draws.

    Raises:
        ConfigError: a negative count, or more than there are.
    """
    most = int(USABLE_SHARE * min(template.combinations for template in templates)) * len(templates)
    if not 0 <= count <= most:
        raise ConfigError(f"count is {count}; give 0 to {most} problems of these kinds")
    rng = random.Random(seed)
    used: set[tuple[str, ...]] = set()
    return [_new_row(template, rng, used) for template in _balanced(templates, count, rng)]


def _check_counts(train: int, held_out: int) -> None:
    for name, count in {"train": train, "held_out": held_out}.items():
        if count < 0:
            raise ConfigError(f"{name} is {count}; give 0 or more problems")
    templates = (*TRAINED, *UNSEEN)
    most = int(USABLE_SHARE * min(template.combinations for template in templates)) * len(TRAINED)
    if train + held_out > most:
        raise ConfigError(f"{train} + {held_out} problems are more than there are; give at most {most} in all")


def _balanced(templates: Sequence[ProblemTemplate], count: int, rng: random.Random) -> Iterator[ProblemTemplate]:
    """`count` templates in random order, each equally often up to one."""
    order = [templates[index % len(templates)] for index in range(count)]
    for last in range(count - 1, 0, -1):
        other = _draw(rng, 0, last)
        order[last], order[other] = order[other], order[last]
    return iter(order)


def _new_row(template: ProblemTemplate, rng: random.Random, used: set[tuple[str, ...]]) -> dict[str, Any]:
    """A row whose problem is not among those used, and now is."""
    while True:
        row = _row(template, rng)
        identity = (template.name, *re.findall(r"\d+", row["instruction"]))
        if identity not in used:
            used.add(identity)
            return row


def _row(template: ProblemTemplate, rng: random.Random) -> dict[str, Any]:
    first = _draw(rng, 0, len(NAMES) - 1)
    second = (first + _draw(rng, 1, len(NAMES) - 1)) % len(NAMES)
    words = {
        "name": NAMES[first],
        "friend": NAMES[second],
        "things": THINGS[_draw(rng, 0, len(THINGS) - 1)],
    }
    values = {name: _draw(rng, low, high) for name, (low, high) in template.draws.items()}
    for step in template.given:
        _apply(step, values)
    question = template.question.format(**words, **values)
    sentences = [sentence.format(**words, equation=_apply(step, values)) for step, sentence in template.steps]
    answer = values[template.steps[-1][0].split()[0]]
    output = f"{' '.join(sentences)} The answer is: {answer}"
    return {"instruction": question, "output": output, "template": template.name}


def _apply(step: str, values: dict[str, int]) -> str:
    """Add the result of "result = left operator right" to the values; returns the equation in numbers."""
    result, _, left, sign, right = step.split()
    a, b = (int(term) if term.isdigit() else values[term] for term in (left, right))
    values[result] = OPERATIONS[sign](a, b)
    return f"{a} {sign} {b} = {values[result]}"


def _draw(rng: random.Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))
