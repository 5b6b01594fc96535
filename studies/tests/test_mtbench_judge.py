"""Verdicts from intervals."""

from __future__ import annotations

import pytest

from studies.interval import mean_interval
from studies.judge import advantage, by_seed, listed, verdict_of

POSITIVE, NEGATIVE = mean_interval([1.0, 1.1, 0.9]), mean_interval([-1.0, -1.1, -0.9])
UNCLEAR = mean_interval([1.0, -1.0, 0.5])


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([POSITIVE, POSITIVE], "holds"),
        ([POSITIVE, UNCLEAR], "holds in part"),
        ([POSITIVE, NEGATIVE], "holds in part"),
        ([UNCLEAR, NEGATIVE], "does not hold here"),
        ([mean_interval([3.0])], "does not hold here"),
    ],
)
def test_a_part_holds_where_its_whole_interval_is_above_zero(parts: list, verdict: str) -> None:
    assert verdict_of({str(place): part for place, part in enumerate(parts)}) == verdict


def test_listed_parts_say_which_is_which() -> None:
    parts = {"a": POSITIVE, "b": NEGATIVE, "c": UNCLEAR, "d": mean_interval([3.0])}
    found = listed({name: part.as_dict() for name, part in parts.items()})
    assert [(name, word) for name, _, word in found] == [
        ("a", "shown"),
        ("b", "the opposite"),
        ("c", "undecided"),
        ("d", "undecided"),
    ]
    assert next(difference for _, difference, _ in found) == "1.00 ± 0.25"


def test_rows_are_averaged_by_seed_and_compared_in_pairs() -> None:
    rows = [
        {"method": method, "rank": rank, "seed": seed, "loss": seed + rank + (10 if method == "lora" else 0)}
        for seed in (4, 1)
        for method in ("lora", "pissa")
        for rank in (2, 4, 8)
    ]
    assert by_seed(rows, "loss", method="pissa", rank=[2, 4]) == [4, 7]
    assert by_seed(rows, lambda row: 2 * row["loss"], method="pissa", rank=8) == [18, 24]
    assert advantage(rows, "loss", {"method": "lora"}, {"method": "pissa"}).values == pytest.approx((10, 10))
