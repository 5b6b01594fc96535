"""Invariants of the study of one learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from passes import Quick

from pissa import SpectralProduct
from pissa.live.state import adapter_factors
from studies.one_rate import ADAMW, Cell, Curve, cells, maker, one_rate, parts_of, summary
from studies.one_rate_tasks import TASKS, adapted, find_task
from studies.study import Settings

CELL = Cell("digits", "lora", 4, 1.0, 32)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(Path(tmp_path_factory.mktemp("one-rate")), "quick", (0, 1))


def curve(best: float, optimizer: str = ADAMW, cell: Cell = CELL) -> Curve:
    """Losses of two seeds that are least at one rate; 2 is where both began."""
    return Curve(cell, optimizer, [2.0, 2.0], {rate: [abs(rate - best), abs(rate - best)] for rate in (0.5, 1.0, 2.0)})


def test_every_start_is_at_the_pretrained_function(settings: Settings) -> None:
    task = find_task(settings, "digits")
    expected = task.held_out(task.fresh(0), 0)
    for start in ("lora", "pissa", "directions 0.25", "random 1"):
        for scale in (1.0, 2.0):
            model = adapted(task, start, 4, scale, 0)
            assert task.held_out(model, 0) == pytest.approx(expected, rel=1e-4), start
            norms = [float(torch.linalg.matrix_norm(f.scale * f.B @ f.A, 2)) for f in adapter_factors(model).values()]
            if start.split()[0] in ("directions", "random"):
                assert norms == pytest.approx([float(start.split()[1])] * len(norms), rel=1e-3)
            else:
                assert all(norm > 0 for norm in norms) == (start == "pissa")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns_from_its_batches(settings: Settings, name: str) -> None:
    task = find_task(settings, name)
    model = adapted(task, "pissa", 2, 1.0, 0)
    optimizer = SpectralProduct(model)
    batch = next(task.batches(task.batch, 0))
    losses = []
    for _ in range(4):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_grid_is_starts_by_ranks_and_two_ways_beside_it(settings: Settings) -> None:
    found = cells(settings, find_task(settings, "digits"))
    assert len(found) == len(set(found)) == 2 * (3 + 1 + 2)
    assert {cell.scale for cell in found} == {1.0, 2.0}
    assert len({cell.batch for cell in found}) == 3 and len({cell.rank for cell in found}) == 3


def test_what_one_rate_loses_is_a_share_of_what_is_learned() -> None:
    assert curve(1.0).best == 1.0
    assert curve(1.0).lost(2.0) == [0.5, 0.5]
    found = [curve(1.0), curve(1.0), curve(2.0)]
    assert one_rate(found) == 1.0
    told = summary(found, ADAMW, 1.0)
    assert told["best_rates"] == [1.0, 2.0] and told["within_a_factor_two"] == 3
    assert told["most_lost"] == 0.5 and told["at_most_5_percent_lost"] == 0


def test_parts_are_positive_where_the_rates_of_adamw_are_wider_apart() -> None:
    others = Cell("digits", "pissa", 4, 1.0, 32)
    found = [curve(0.5), curve(2.0, ADAMW, others), curve(1.0, "spectral"), curve(1.0, "spectral", others)]
    parts = parts_of(found, {ADAMW: 0.5, "spectral": 1.0})
    spread, lost, least = parts.values()
    assert spread.mean == 2 and lost.mean > 0 and least.mean == 0


def test_a_step_of_root_mean_squares_is_longer_where_more_comes_out(settings: Settings) -> None:
    model = adapted(find_task(settings, "digits"), "lora", 4, 1.0, 0)
    make = maker("root of out over in")
    assert make is not None and maker(ADAMW) is None
    group = make(model, 0.1).param_groups[0]
    for pair, A, B in zip(group["pairs"], group["params"][::2], group["params"][1::2], strict=True):
        assert 1 / pair["scale"] == pytest.approx((B.shape[0] / A.shape[1]) ** 0.5)


def test_a_quick_pass_measures_both_at_one_rate(quick: Quick) -> None:
    results = quick("one-rate")["results"]
    for each in results["curves"]:
        rates = [float(rate) for rate in each["losses"]]
        assert results["one_rate"][each["optimizer"]] in rates
        assert all(loss is None or loss > 0 for losses in each["losses"].values() for loss in losses)
