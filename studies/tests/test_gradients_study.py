"""Invariants of the gradients study."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from studies.gradients import in_the_plane, shares


def test_gradients_at_the_start_are_what_the_algebra_says(quick: Quick) -> None:
    lora, pissa = quick("gradients")["results"]["starts"]
    assert lora["A"]["norms"] == [0] * 5 and lora["A"]["cosines"] == []
    assert max(lora["B"]["cosines"]) < 0.9
    for side in "AB":
        assert min(pissa[side]["norms"]) > 0
        assert min(pissa[side]["cosines"]) > 0.99


def test_the_way_begins_at_nothing(quick: Quick) -> None:
    for row in quick("gradients")["results"]["runs"]:
        assert len(row["losses"]) == 8
        for side in "AB":
            assert len(row[f"way_{side}"]) == 6
            assert row[f"way_{side}"][0] == 0
        if "lora" in row["method"]:
            # B is zero at first, so A stands still for a step
            assert row["way_A"][1] == 0 < row["way_B"][1]


def test_shares_and_planes_by_hand() -> None:
    points = [torch.tensor([1.0, 1]), torch.tensor([2.0, 5]), torch.tensor([5.0, 1])]
    assert shares(points) == [0, 0.25]
    found = in_the_plane(torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0.5, 0]]))
    assert found["norms"] == [2, 3, 0.5]
    assert found["cosines"] == pytest.approx([0, 0.5**0.5, 0.5**0.5])
    plane = torch.tensor(found["plane"]).double()
    assert torch.allclose(plane @ plane.mT, torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]).double(), atol=1e-6)
