"""The kinds of arithmetic word problem that the demo asks.

A template is a question, the numbers that are drawn for it, and one to three steps of integer arithmetic, each with a
sentence of the solution. "total = days * each" is a step: one operation on earlier values or literal numbers. Steps
under `given` make numbers of the question (a dividend from divisor and quotient, so that every division is exact);
they are not part of the solution. All values are positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ProblemTemplate:
    """One kind of word problem."""

    name: str
    """What rows call it."""
    question: str
    """Text with {name}, {friend}, {things} and numbers by name."""
    draws: Mapping[str, tuple[int, int]]
    """Smallest and largest value of each number that is drawn."""
    steps: tuple[tuple[str, str], ...]
    """(step, sentence) pairs; the sentence shows the step's equation at {equation}."""
    given: tuple[str, ...] = ()
    """Steps that make numbers of the question."""

    @property
    def combinations(self) -> int:
        """How many problems there are, names and things aside."""
        total = 1
        for low, high in self.draws.values():
            total *= high - low + 1
        return total


TRAINED = (
    ProblemTemplate(
        "gain",
        "{name} has {a} {things}. {friend} gives {name} {b} more. How many {things} does {name} have now?",
        {"a": (12, 99), "b": (11, 89)},
        (("sum = a + b", "{name} now has {equation} {things}."),),
    ),
    ProblemTemplate(
        "spend",
        "{name} has {a} dollars and buys a bag for {b} dollars. How many dollars are left?",
        {"b": (11, 79), "left": (5, 69)},
        (("rest = a - b", "After buying the bag, {equation} dollars are left."),),
        given=("a = b + left",),
    ),
    ProblemTemplate(
        "boxes",
        "There are {a} boxes in a shop. Each box holds {b} {things}. How many {things} are in the boxes?",
        {"a": (6, 49), "b": (3, 49)},
        (("all = a * b", "The boxes hold {equation} {things}."),),
    ),
    ProblemTemplate(
        "share",
        "{name} shares {all} {things} equally among {a} children. How many {things} does each child get?",
        {"a": (3, 39), "each": (4, 49)},
        (("part = all / a", "Each child gets {equation} {things}."),),
        given=("all = a * each",),
    ),
    ProblemTemplate(
        "reading",
        "A book has {all} pages. {name} reads {a} pages a day for {b} days. How many pages are left to read?",
        {"a": (8, 35), "b": (3, 12), "left": (5, 60)},
        (("read = a * b", "{name} reads {equation} pages."), ("rest = all - read", "Then {equation} pages are left.")),
        given=("seen = a * b", "all = seen + left"),
    ),
    ProblemTemplate(
        "shopping",
        "{name} buys {a} notebooks for {b} dollars each and a lamp for {c} dollars. How many dollars is that in all?",
        {"a": (3, 12), "b": (2, 15), "c": (10, 60)},
        (
            ("books = a * b", "The notebooks cost {equation} dollars."),
            ("all = books + c", "Together it is {equation} dollars."),
        ),
    ),
    ProblemTemplate(
        "friends",
        "{name} has {a} {things} and {friend} has {b} more than {name}. How many {things} do they have together?",
        {"a": (8, 70), "b": (5, 50)},
        (
            ("other = a + b", "{friend} has {equation} {things}."),
            ("all = a + other", "Together they have {equation} {things}."),
        ),
    ),
    ProblemTemplate(
        "trays",
        "A baker makes {a} rolls and {b} buns and puts {c} pieces on each tray. How many trays are filled?",
        {"c": (3, 12), "trays": (5, 20), "b": (5, 13)},
        (("all = a + b", "The baker makes {equation} pieces."), ("filled = all / c", "They fill {equation} trays.")),
        given=("sum = c * trays", "a = sum - b"),
    ),
    ProblemTemplate(
        "garden",
        "A garden has {a} rows of {b} plants. A storm ruins {c} of them. How many plants are left?",
        {"a": (5, 20), "b": (4, 20), "c": (2, 19)},
        (
            ("all = a * b", "There were {equation} plants."),
            ("rest = all - c", "After the storm {equation} plants are left."),
        ),
    ),
    ProblemTemplate(
        "wages",
        "{name} earns {a} dollars an hour, works {b} hours and spends {c} dollars. How many dollars are left?",
        {"a": (9, 30), "b": (4, 12), "c": (5, 33)},
        (("pay = a * b", "{name} earns {equation} dollars."), ("kept = pay - c", "Then {equation} dollars are left.")),
    ),
    ProblemTemplate(
        "trip",
        "A bus drives {a} km in the morning and {b} km in the afternoon, every day for {c} days. How many km is that?",
        {"a": (12, 60), "b": (10, 50), "c": (2, 9)},
        (("day = a + b", "In a day it drives {equation} km."), ("all = day * c", "In all it drives {equation} km.")),
    ),
    ProblemTemplate(
        "packs",
        "{name} has {a} packs of {b} {things}, gives away {c} and gets {d} back. How many {things} are there now?",
        {"a": (3, 12), "b": (6, 15), "c": (4, 16), "d": (2, 9)},
        (
            ("start = a * b", "There are {equation} {things}."),
            ("less = start - c", "Then {equation} are left."),
            ("now = less + d", "Now there are {equation} {things}."),
        ),
    ),
    ProblemTemplate(
        "tickets",
        "{a} adults pay {b} dollars each and {c} children pay {d} dollars each. How many dollars do they pay in all?",
        {"a": (3, 12), "b": (9, 20), "c": (4, 15), "d": (3, 8)},
        (
            ("adults = a * b", "Adults pay {equation} dollars."),
            ("children = c * d", "Children pay {equation} dollars."),
            ("all = adults + children", "In all, {equation} dollars."),
        ),
    ),
    ProblemTemplate(
        "crates",
        "A farmer picks {a} baskets of {b} apples and packs them into crates of {c}. How many crates are needed?",
        {"c": (4, 16), "half": (3, 14), "b": (3, 15)},
        (
            ("all = a * b", "The farmer picks {equation} apples."),
            ("needed = all / c", "They need {equation} crates."),
        ),
        given=("a = c * half",),
    ),
)
UNSEEN = (
    ProblemTemplate(
        "tank",
        "A tank holds {a} litres of water. A pump takes out {b} litres a minute for {c} minutes. How much is left?",
        {"b": (3, 25), "c": (4, 15), "left": (6, 80)},
        (
            ("out = b * c", "The pump takes out {equation} litres."),
            ("rest = a - out", "Then {equation} litres are left."),
        ),
        given=("gone = b * c", "a = gone + left"),
    ),
    ProblemTemplate(
        "saving",
        "{name} wants a bike for {a} dollars, has {b} dollars and saves {c} a week. How many weeks does it take?",
        {"c": (4, 25), "weeks": (3, 20), "b": (8, 60)},
        (
            ("missing = a - b", "{name} still needs {equation} dollars."),
            ("needed = missing / c", "It takes {equation} weeks."),
        ),
        given=("saved = c * weeks", "a = saved + b"),
    ),
    ProblemTemplate(
        "classes",
        "A school has {a} classes of {b} pupils and {c} teachers. How many people are at the school?",
        {"a": (4, 18), "b": (12, 30), "c": (5, 40)},
        (("pupils = a * b", "There are {equation} pupils."), ("all = pupils + c", "There are {equation} people.")),
    ),
    ProblemTemplate(
        "teams",
        "{a} girls and {b} boys form {c} equal teams, and {d} coaches join each team. How many people are in a team?",
        {"c": (3, 9), "each": (6, 12), "b": (5, 16), "d": (2, 4)},
        (
            ("all = a + b", "There are {equation} players."),
            ("players = all / c", "Each team has {equation} players."),
            ("people = players + d", "With coaches it has {equation} people."),
        ),
        given=("sum = c * each", "a = sum - b"),
    ),
)
