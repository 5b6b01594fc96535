"""Invariants of the studies of combinations, precision, ranks, long runs, families and direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import Quick

from studies import direction_or_scale, families, long_run, precision, ranks
from studies.lm import InMemory, language_task
from studies.study import Settings
from tiny import logits_of, tiny_llama


@pytest.mark.parametrize("arm", direction_or_scale.ARMS)
def test_every_arm_starts_at_the_base(arm: str) -> None:
    base = tiny_llama(hidden=64)
    before = logits_of(base)
    model, norms = direction_or_scale.build(base, arm, seed=0)
    assert torch.allclose(logits_of(model), before, atol=1e-5)
    assert (norms["B"] == 0) == arm.startswith("lora")


def test_arms_differ_in_direction_and_scale_as_they_say() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    found = {arm: direction_or_scale.initial_factors(W, arm, seed=0) for arm in direction_or_scale.ARMS}
    U, S, Vh = torch.linalg.svd(W)
    r = direction_or_scale.RANK
    A, B = found["pissa"]
    assert torch.allclose(B @ A, U[:, :r] * S[:r] @ Vh[:r], atol=1e-3)
    norms = {arm: float(A.norm()) for arm, (A, _) in found.items()}
    for arm in ("lora, principal", "pissa, small", "random, small"):
        assert norms[arm] == pytest.approx(norms["lora"], rel=1e-4)
    assert norms["random"] == pytest.approx(norms["pissa"], rel=1e-4)
    inside = {arm: float((A @ Vh[:r].T @ Vh[:r]).norm() / A.norm()) for arm, (A, _) in found.items()}
    for arm, share in inside.items():
        principal = "pissa" in arm or "principal" in arm
        assert share == pytest.approx(1, abs=1e-3) if principal else share < 0.9


def test_precision_needs_a_visible_move_and_both_sides() -> None:
    def rows(*above: float) -> list[dict[str, Any]]:
        return [
            {"dtype": dtype, "share": share, "seed": seed, "held_out_loss": 1 + 0.01 * seed + extra * (dtype == "bf16")}
            for dtype in ("fp32", "bf16")
            for share, extra in enumerate(above)
            for seed in range(3)
        ]

    def shown(*above: float) -> list[bool]:
        return [part.above_zero for part in precision._parts(rows(*above), {0: 1e-3, 1: 1e-4}).values()]

    assert shown(0.5, -0.5) == [True, True, True, True]
    assert shown(0.5, 0.001) == [True, False, True, False]
    assert shown(-0.001, -0.5) == [False, True, False, True]


def test_precision_computes_what_it_says(quick: Quick) -> None:
    rows = quick("precision")["results"]["runs"]
    first = {dtype: [row["losses"][0] for row in rows if row["dtype"] == dtype] for dtype in precision.DTYPES}
    assert first["bf16"] == pytest.approx(first["fp32"], rel=2e-2) and first["bf16"] != first["fp32"]
    assert first["autocast"] == pytest.approx(first["fp32"], rel=2e-2) and first["autocast"] != first["fp32"]
    assert first["bf16"] != first["autocast"]


def test_every_precision_learns(tmp_path: Path) -> None:
    """With stale copies of the weights, as a cache of autocast's makes them, no loss would fall."""
    task = replace(language_task(Settings(tmp_path, "quick")), steps=12)
    memory = InMemory(replace(task, train=task.train[:2], held_out=task.train[:2]))
    found = {dtype: precision._train(memory, dtype, 1e-2, 0, solved=False) for dtype in precision.DTYPES}
    for dtype, values in found.items():
        assert values["losses"][-1] < 0.8 * values["losses"][0], dtype
        assert values["held_out_loss"] == pytest.approx(found["fp32"]["held_out_loss"], rel=0.2), dtype


def test_grids_are_complete(quick: Quick) -> None:
    def seen(name: str, *keys: str) -> set[tuple]:
        return {tuple(row[key] for key in keys) for row in quick(name)["results"]["runs"]}

    seeds = {0, 1}
    assert seen("combinations", "method", "seed") == {(m, s) for m in ("lora", "pissa") for s in seeds}
    assert seen("precision", "dtype", "share", "seed") == {
        (dtype, share, seed) for dtype in precision.DTYPES for share in precision.SHARES[:2] for seed in seeds
    }
    assert seen("long-run", "method", "seed") == {(m, s) for m in long_run.METHODS for s in seeds}
    assert {m for m, _ in seen("ranks", "method", "rank")} == {*ranks.PLAIN, *ranks.QUANTIZED, "full"}
    assert {m for (m,) in seen("families", "method")} == {*families.PLAIN, *families.QUANTIZED}
    assert len(families.COMMANDS) == 9


def test_full_fine_tuning_and_pissa_agree_at_the_first_step(quick: Quick) -> None:
    """Step 0 is the base in every method, so the first loss of a seed is the same."""
    for name in ("combinations", "long-run"):
        first: dict[int, set[float]] = {}
        for row in quick(name)["results"]["runs"]:
            first.setdefault(row["seed"], set()).add(round(row["losses"][0], 4))
        assert all(len(losses) == 1 for losses in first.values()), name


def test_long_runs_are_measured_from_the_base_on(quick: Quick) -> None:
    rows = quick("long-run")["results"]["runs"]
    assert len({round(row["held_out_losses"][0], 4) for row in rows}) == 1
    assert all(len(row["held_out_losses"]) > 1 for row in rows)
