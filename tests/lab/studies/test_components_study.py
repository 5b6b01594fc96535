"""Invariants of the components study."""

from __future__ import annotations

import pytest
from passes import Quick

from pissa.lab.studies.components import COMPONENTS, PAPER_RATE, parts_of, recipe_for


def test_every_component_starts_from_the_same_function(quick: Quick) -> None:
    rows = quick("components")["results"]["rows"]
    assert [row["component"] for row in rows] == [*COMPONENTS, *COMPONENTS]
    for seed in (0, 1):
        starts = [row["losses"][0] for row in rows if row["seed"] == seed]
        assert starts == pytest.approx([starts[0]] * len(COMPONENTS), rel=1e-3)


def test_recipes_ask_for_the_component() -> None:
    found = {name: recipe_for(name, "all-linear", 4, 8, 2, 1e-3, 5).pissa_config() for name in COMPONENTS}
    assert found["random"].method == "random-pissa" and found["random"].random_fraction == 1
    for name in ("principal", "medium", "minor", "scored"):
        assert (found[name].method, found[name].component, found[name].seed) == ("pissa", name, 5)


def test_differences_are_seed_by_seed_and_positive_where_principal_is_lower() -> None:
    rows = [
        {"component": name, "rate": rate, "seed": seed, "final_loss": loss + seed, "held_out_loss": loss + seed - rate}
        for name, loss in (("principal", 1.0), ("medium", 1.5), ("minor", 0.75))
        for rate in (PAPER_RATE, 2e-3)
        for seed in (0, 1, 2)
    ]
    for name, part in parts_of(rows).items():
        assert part.mean == pytest.approx(0.5 if "medium" in name else -0.25)
        assert part.above_zero == ("medium" in name)
