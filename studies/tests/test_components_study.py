"""Invariants of the components study."""

from __future__ import annotations

import pytest
from passes import Quick

from studies.components import COMPONENTS, _parts, recipe_of
from studies.lm import LanguageTask

TASK = LanguageTask("base", "problems", [{}] * 20, [], [], (1e-3,), 5, 2, 4)


def test_every_component_starts_from_the_same_function(quick: Quick) -> None:
    rows = quick("components")["results"]["runs"]
    assert {row["method"] for row in rows} == set(COMPONENTS)
    for seed in (0, 1):
        starts = [row["losses"][0] for row in rows if row["seed"] == seed]
        assert starts == pytest.approx([starts[0]] * len(COMPONENTS), rel=1e-3)


def test_recipes_ask_for_the_component() -> None:
    found = {name: recipe_of(TASK, name, 4, 1e-3, 5).pissa_config() for name in COMPONENTS}
    assert found["random"].method == "random-pissa" and found["random"].random_fraction == 1
    for name in ("principal", "medium", "minor", "scored"):
        assert (found[name].method, found[name].component, found[name].seed) == ("pissa", name, 5)


def test_differences_are_seed_by_seed_and_positive_where_principal_is_lower() -> None:
    best = {"principal": 1e-3, "medium": 2e-3, "minor": 1e-3}
    rows = [
        {"method": name, "rate": rate, "seed": seed, "final_loss": loss + seed, "held_out_loss": loss + seed}
        for name, rate, loss in (
            ("principal", 1e-3, 1.0),
            ("medium", 1e-3, 1.5),
            ("medium", 2e-3, 1.25),
            ("minor", 1e-3, 0.75),
        )
        for seed in (0, 1, 2)
    ]
    parts = _parts(rows, best)
    assert len(parts) == 8
    for name, part in parts.items():
        expected = -0.25 if "minor" in name else 0.25 if "its own" in name else 0.5
        assert part.mean == pytest.approx(expected), name
        assert part.above_zero == ("medium" in name)
