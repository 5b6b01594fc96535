"""One look for each method, in every figure and on every page.

Methods are told apart by colours, dashes and markers. A quantised method has the colour of what it quantises, dashed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..colours import LIGHT

CIRCLE, SQUARE, TRIANGLE, DIAMOND, DOWN = "o", "s", "^", "D", "v"
Dashes: TypeAlias = Literal["-"] | tuple[float, tuple[float, ...]]
SOLID: Dashes = "-"
DASHED: Dashes = (0, (4, 2))
DOTTED: Dashes = (0, (1, 1.6))


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    slot: int
    """Place of its colour in LIGHT and DARK."""
    dashes: Dashes
    """A line style of matplotlib."""
    marker: str

    @property
    def colour(self) -> str:
        """On white."""
        return LIGHT[self.slot]

    @property
    def line(self) -> dict[str, Any]:
        """matplotlib's settings of a line on white."""
        return {"color": self.colour, "linestyle": self.dashes}

    @property
    def svg_dashes(self) -> str:
        """The same dashes for stroke-dasharray in an SVG, at a stroke of 2."""
        return "none" if isinstance(self.dashes, str) else " ".join(f"{2 * part:g}" for part in self.dashes[1])


LOOKS = {
    "lora": Look(0, SOLID, CIRCLE),
    "lora-kaiming": Look(0, SOLID, CIRCLE),
    "lora-gaussian": Look(0, DOTTED, TRIANGLE),
    "qlora": Look(0, DASHED, DIAMOND),
    "pissa": Look(1, SOLID, SQUARE),
    "random-pissa": Look(1, DOTTED, TRIANGLE),
    "qpissa": Look(1, DASHED, DIAMOND),
    "dora": Look(2, SOLID, TRIANGLE),
    "cura": Look(2, DOTTED, DOWN),
    "adalora": Look(3, SOLID, DIAMOND),
    "loftq": Look(3, DASHED, DOWN),
    "pissa+dora": Look(4, SOLID, DOWN),
    "pissa+adalora": Look(5, SOLID, DIAMOND),
    "robust-pissa": Look(5, DOTTED, SQUARE),
    "full": Look(6, SOLID, CIRCLE),
}


def look_of(method: str, number: int | None = None) -> Look:
    """A method's own look.

    Args:
        method: with iterations (`qpissa-5`) or behind a format (`nf4 lora`) it looks like its family.
        number: chooses the colour of a method that has no look of its own; None where every method must have one.

    Raises:
        KeyError: the method has none, and no number is given.
    """
    name = method.rpartition(" ")[2]
    family, _, iterations = name.rpartition("-")
    known = LOOKS.get(family if iterations.isdigit() else name)
    if known is None and number is None:
        raise KeyError(f"{method} has no look of its own in LOOKS")
    return known or Look((number or 0) % len(LIGHT), SOLID, CIRCLE)


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """Method -> its look; methods that are not known take what is left over."""
    left = [Look(slot, dashes, CIRCLE) for dashes in (SOLID, DASHED, DOTTED) for slot in range(len(LIGHT))]
    known = {method: LOOKS[method] for method in methods if method in LOOKS}
    free = [look for look in left if (look.slot, look.dashes) not in {(k.slot, k.dashes) for k in known.values()}]
    looks, place = {}, 0
    for method in methods:
        if method in known:
            looks[method] = known[method]
        else:
            looks[method] = (free or left)[place % len(free or left)]
            place += 1
    return looks
