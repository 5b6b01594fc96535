"""Rank plans against brute force over all plans, and what their bound promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa.config import Quantization
from pissa.errors import ConfigError
from pissa.quantize.formats import quantize_matrix
from pissa.ranks import plan_ranks, uniform_plan, weighed_components

Gains = dict[str, Tensor]


def best_plan(gains: Gains, costs: dict[str, int], budget: int, least: int = 1) -> float:
    """The most that any plan captures, by trying all of them."""
    names = list(gains)
    best = -1.0
    for ranks in itertools.product(*(range(least, len(gains[name]) + 1) for name in names)):
        if sum(r * costs[name] for r, name in zip(ranks, names, strict=True)) <= budget:
            captured = sum(float(gains[name][:r].sum()) for r, name in zip(ranks, names, strict=True))
            best = max(best, captured)
    return best


@st.composite
def problems(draw: st.DrawFn, equal_costs: bool) -> tuple[Gains, dict[str, int]]:
    count = draw(st.integers(1, 4))
    gains, costs = {}, {}
    common = draw(st.integers(1, 9))
    for i in range(count):
        values = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
        gains[f"w{i}"] = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        costs[f"w{i}"] = common if equal_costs else draw(st.integers(1, 9))
    return gains, costs


def budgets(gains: Gains, costs: dict[str, int]) -> range:
    most = sum(costs[name] * len(each) for name, each in gains.items())
    return range(sum(costs.values()), most + 4)


@settings(max_examples=80, deadline=None)
@given(problems(equal_costs=True))
def test_with_equal_costs_greedy_is_optimal_for_every_budget(problem: tuple[Gains, dict[str, int]]) -> None:
    gains, costs = problem
    for budget in budgets(gains, costs):
        plan = plan_ranks(gains, costs, budget)
        assert plan.captured == pytest.approx(best_plan(gains, costs, budget))


@settings(max_examples=80, deadline=None)
@given(problems(equal_costs=False))
def test_with_any_costs_the_bound_holds_and_is_reached_where_the_budget_is_spent(
    problem: tuple[Gains, dict[str, int]],
) -> None:
    gains, costs = problem
    for budget in budgets(gains, costs):
        plan = plan_ranks(gains, costs, budget)
        best = best_plan(gains, costs, budget)
        assert plan.cost == sum(costs[name] * r for name, r in plan.ranks.items()) <= budget
        assert plan.captured == pytest.approx(sum(float(gains[name][:r].sum()) for name, r in plan.ranks.items()))
        assert plan.captured <= best + 1e-9 and best <= plan.bound + 1e-9
        # less than one component's worth is ever lost
        assert plan.bound - plan.captured <= max(float(each.max()) for each in gains.values()) + 1e-9
        if plan.bound == plan.captured:
            assert plan.captured == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(problems(equal_costs=False))
def test_budgets_that_greedy_spends_exactly_are_optimal(problem: tuple[Gains, dict[str, int]]) -> None:
    gains, costs = problem
    order = sorted(
        (
            (-float(g) / costs[name], i, k)
            for i, (name, each) in enumerate(gains.items())
            for k, g in enumerate(each)
            if k
        ),
    )
    spent = sum(costs.values())
    for _, i, _ in order:
        spent += costs[f"w{i}"]
        plan = plan_ranks(gains, costs, spent)
        assert plan.cost == spent and plan.bound == plan.captured
        assert plan.captured == pytest.approx(best_plan(gains, costs, spent))


def test_the_plan_beats_the_uniform_one_and_respects_the_least_rank() -> None:
    gains = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([5.0, 1, 0.5]), "c": torch.tensor([2.0, 2])}
    costs = {"a": 2, "b": 2, "c": 2}
    uniform = uniform_plan(gains, costs, 13)
    assert uniform.ranks == {"a": 2, "b": 2, "c": 2} and uniform.captured == 27
    plan = plan_ranks(gains, costs, uniform.cost)
    assert plan.ranks == {"a": 4, "b": 1, "c": 1} and plan.captured == 37
    assert plan_ranks(gains, costs, 13, least=2).ranks == {"a": 2, "b": 2, "c": 2}
    assert uniform_plan(gains, costs, 100).ranks == {"a": 4, "b": 3, "c": 2}
    with pytest.raises(ConfigError, match=r"rank_budget is 5; 3 weights at rank 1 take 6 parameters"):
        plan_ranks(gains, costs, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gains_are_squared_singular_values_of_what_the_adapter_is_to_capture() -> None:
    W, X = normal(40, 64), normal(200, 64, seed=1) * torch.logspace(0, -2, 64)
    M = X.T @ X / 200
    exact = torch.linalg.svdvals(W.double())[:5].square()
    torch.testing.assert_close(weighed_components(W, 5, tolerance=0.0).gains, exact, rtol=1e-5, atol=0)
    E = W - quantize_matrix(W, Quantization(), W.dtype).dequantize()
    found = weighed_components(W, 5, quantization=Quantization(), tolerance=0.0).gains
    torch.testing.assert_close(found, torch.linalg.svdvals(E.double())[:5].square(), rtol=1e-4, atol=0)
    # what the layer puts out: E ‖x Wᵀ‖² is the energy of X Wᵀ
    weighted = weighed_components(W, 5, moment=M, tolerance=0.0).gains
    outputs = torch.linalg.svdvals(X.double() @ W.double().T / 200**0.5)[:5].square()
    torch.testing.assert_close(weighted, outputs, rtol=1e-3, atol=0)
