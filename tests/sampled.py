"""Grids of cases of which `make test` runs a sample and `make test-all` every one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], always: Collection[Any] = (), whole: Collection[Any] = ()) -> list[Any]:
    """All combinations for pytest; of the last axis a combination of the others keeps one value, the rest are slow.

    Which one goes round with the places on the other axes, so that each of their values meets each of the last axis's.

    Args:
        axes: the values of each; a tuple stands for several parameters.
        always: values of the last axis that every combination keeps besides.
        whole: values of the first axis that keep the last axis whole.
    """
    *others, last = [list(axis) for axis in axes]
    turns = [value for value in last if value not in always]
    parameters = []
    for places in product(*(range(len(axis)) for axis in others)):
        values = [axis[place] for axis, place in zip(others, places, strict=True)]
        turn = turns[sum(places) % len(turns)]
        for value in last:
            kept = value in always or value == turn or values[0] in whole
            parameters.append(pytest.param(*_flat([*values, value]), marks=() if kept else pytest.mark.slow))
    return parameters


def _flat(values: list[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
