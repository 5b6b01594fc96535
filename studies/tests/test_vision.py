"""Invariants of the study of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import Quick

from studies import image_task, vision
from studies.fit import Diverged, Fit
from studies.image_task import METHODS, image_run, image_search_run, untested
from studies.images import patterns
from studies.registry import find_study
from studies.study import Settings

RUN: dict[str, Any] = {"task": "mnist", "network": "vit", "rank": 4, "seed": 0, "steps": 2, "batch": 8, "rate": 1e-3}


def test_the_seeds_are_the_reports() -> None:
    assert find_study("vision").seeds("default") == (0, 100, 200, 300, 400)


def test_the_grid_is_complete(quick: Quick) -> None:
    rows = quick("vision")["results"]["runs"]
    seen = {(row["task"], row["network"], row["method"]) for row in rows}
    digits = {("mnist", "vit", method) for method in vision.DIGIT_METHODS}
    assert seen == {("pacs", network, method) for network in ("vit", "cnn") for method in METHODS} | digits
    assert len(rows) == len(seen) * len(quick("vision")["settings"]["seeds"])
    assert all(0 <= row["accuracy"] <= 1 and row["failed"] is None for row in rows)
    assert all(len(row["losses"]) == row["steps"] for row in rows if row["task"] == "mnist")


def test_both_comparisons_and_all_claims_are_judged(quick: Quick) -> None:
    results = quick("vision")["results"]
    for table in (results["at_one_rate"], results["at_best_rate"]):
        assert table["pacs"].keys() == METHODS.keys()
        assert table["early_loss"].keys() == set(vision.DIGIT_METHODS)
    names = list(results["parts"])
    assert len(names) == 18
    assert sum(name.endswith("each at its own rate") for name in names) == 8
    assert results["search"].keys() == {"pacs", "mnist"}


def test_every_method_is_timed_with_every_seed(quick: Quick) -> None:
    rows = quick("vision")["results"]["initialisation"]
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in METHODS for s in (0, 100)}
    assert all(row["seconds"] >= 0 for row in rows)


def test_all_methods_start_at_the_same_function(quick: Quick) -> None:
    """The report's CURA may have a residual larger than the weight; together with its factors it is the weight."""
    for seed in (0, 100):
        rows = [r for r in quick("vision")["results"]["runs"] if (r["task"], r["seed"]) == ("mnist", seed)]
        assert len(rows) == len(vision.DIGIT_METHODS)
        assert max(row["losses"][0] for row in rows) == pytest.approx(min(row["losses"][0] for row in rows), rel=1e-3)


def test_the_reports_cura_has_a_larger_residual_than_the_optimal_one(quick: Quick) -> None:
    worst: dict[str, float] = {}
    for row in quick("vision")["results"]["runs"]:
        if "cura" in row["method"]:
            worst[row["method"]] = max(worst.get(row["method"], 0), row["residual_norm"])
        else:
            assert row["residual_norm"] is None
    assert worst["cura"] > 1 >= worst["cura-optimal"]


def test_a_search_sees_no_image_that_a_seed_tests_on() -> None:
    images = patterns(100, 4, 8)
    images.pixels[:, 0, 0, 0] = torch.arange(100)
    seen = set(untested(images, (0, 100)).pixels[:, 0, 0, 0].tolist())
    for seed in (0, 100):
        train, test = images.split(0.8, seed)
        assert not seen & set(test.pixels[:, 0, 0, 0].tolist())
        assert seen <= set(train.pixels[:, 0, 0, 0].tolist())
    assert len(seen) >= 60
    with pytest.raises(ValueError, match="give fewer"):
        untested(images, range(30))


def test_a_run_of_the_search_is_validated(tmp_path: Path) -> None:
    found = image_search_run(Settings(tmp_path, "quick"), **{**RUN, "method": "pissa"}, tested=[0])
    assert found["held_out_loss"] > 0 and 0 <= found["accuracy"] <= 1


def test_training_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: Any, after_step: Any, **__: Any) -> None:
        after_step(1)
        raise Diverged("loss nan in step 2", Fit([2.0], [7.0]))

    settings = Settings(tmp_path, "quick")
    image_task.network_of(settings, "vit")
    monkeypatch.setattr(image_task, "fit", diverging)
    row = {**RUN, **image_run(settings, **RUN, method="cura")}
    assert (row["accuracy"], row["failed"]) == (0, "loss nan in step 2")
    assert (row["losses"], row["first_grad_norm"]) == ([2.0], 7.0)
    assert len(row["accuracy_by_step"]) == 2 and row["accuracy_by_step"][1] == 0
    assert vision.early_loss(row) == pytest.approx((2 + math.log(10)) / 2)
    assert vision.early_loss({**row, "losses": [2.0, 5.0], "steps": 3}) == pytest.approx(4)
    assert vision.early_loss({**row, "losses": [], "steps": 3}) == pytest.approx(math.log(10))
