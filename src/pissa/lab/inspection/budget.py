"""How a budget of parameters is best shared out over a model's layers: `pissa inspect --rank-budget`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from torch import nn

from ...config import PissaConfig, Quantization
from ...live.budget import parameters_per_rank, target_gains, target_total
from ...ranks import plan_ranks, uniform_plan
from .layers import kind_of, select_targets

CURVE_POINTS = 12
"""Budgets in a curve."""


def inspect_budget(
    model: nn.Module,
    rank: int,
    budget: int,
    *,
    quantization: Quantization | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How a budget of parameters is best shared out (`ranks.py`), beside the largest uniform rank that it pays for.

    Args:
        model, target_modules, max_layers, progress: see `measure.inspect_quantized`.
        rank: the largest rank that a layer may get.
        budget: parameters of all adapters together.
        quantization: a format whose error is to be captured; None for the energy of the weights.

    Returns:
        `layers`: for each `name`, `kind`, `shape`, `rank`, `uniform_rank`; `rank_pattern`: name -> rank, as PEFT takes
        it; `budget`, `parameters`; `captured` and `uniform_captured`: shares of the whole energy (or squared error),
        percent, and `captured_bound`, which no plan can exceed; `curve`: the same three for shares of the budget.
    """
    chosen = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    config = PissaConfig(rank=rank, target_modules=chosen, rank_budget=budget, quantization=quantization)
    targets = select_targets(model, config, max_layers)
    task = None if progress is None else progress.add_task("spectra", total=len(targets), note="")
    gains, total = {}, 0.0
    for target in targets:
        gains[target.name] = target_gains(target, config, None)
        total += target_total(target, config)
        if progress is not None and task is not None:
            progress.update(task, advance=1, note=target.name)
    costs = {target.name: parameters_per_rank(target) for target in targets}
    plan, uniform = plan_ranks(gains, costs, budget), uniform_plan(gains, costs, budget)
    layers = [
        {
            "name": target.name,
            "kind": kind_of(target.name),
            "shape": list(target.place.matrix_shape),
            "rank": plan.ranks[target.name],
            "uniform_rank": uniform.ranks[target.name],
        }
        for target in targets
    ]
    unit = 100 / total if total > 0 else 0.0
    return {
        "layers": layers,
        "rank_pattern": plan.ranks,
        "budget": budget,
        "parameters": plan.cost,
        "captured": unit * plan.captured,
        "captured_bound": unit * plan.bound,
        "uniform_captured": unit * uniform.captured,
        "uniform_parameters": uniform.cost,
        "curve": [
            {"budget": part, "captured": unit * best.captured, "uniform_captured": unit * alike.captured}
            for part in budgets(sum(costs.values()), budget)
            for best, alike in [(plan_ranks(gains, costs, part), uniform_plan(gains, costs, part))]
        ],
    }


def budgets(least: int, most: int) -> list[int]:
    """Some budgets up to `most`, evenly spaced on a logarithmic axis."""
    return sorted({round(least * (most / least) ** (i / CURVE_POINTS)) for i in range(CURVE_POINTS + 1)})
