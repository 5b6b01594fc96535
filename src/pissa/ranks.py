"""How many components each weight gets under one budget of parameters.

    maximise Σᵢ Σ_{k ≤ rᵢ} gᵢ(k)        subject to Σᵢ cᵢ·rᵢ ≤ budget,  least ≤ rᵢ ≤ mostᵢ

gᵢ(k) is what component k of weight i is worth, cᵢ = out + in the parameters that it costs. It is worth a squared
singular value: of W, the energy that the adapter captures; of `W − format(W)`, the error of a quantised weight that an
adapter fitted to it removes; of either times the root of the input's second moment, the same as the layer's output
has it. Singular values descend, so every sum is concave, and the best plan takes components in the order of gᵢ(k) / cᵢ:

- where all costs are equal, greedy is optimal for every budget;
- where they differ, it is optimal for each budget that it spends exactly, by Lagrange's argument: a plan that takes
  all components with g / c > λ and no other maximises Σ g − λ Σ c. In between, components that still fit are added in
  the same order, and no plan can capture more than `RankPlan.bound`: what was captured when the first component did
  not fit, plus λ times what was left. The whole gap is less than one component's worth.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Algorithm, Quantization
from .decompose.svd import TOLERANCE, TruncatedSVD, decompose
from .errors import ConfigError
from .quantize.formats import quantize_matrix
from .quantize.metric import metric

DAMPING = 1e-6
"""Share of a moment's mean diagonal that is added to it, against rounding alone."""


@dataclass(frozen=True)
class RankPlan:
    """Ranks by weight, and what they are worth together."""

    ranks: dict[str, int]
    """Name -> rank."""
    cost: int
    """Parameters of all adapters."""
    budget: int
    """How many there might have been."""
    captured: float
    """Σᵢ Σ_{k ≤ rᵢ} gᵢ(k)."""
    bound: float
    """No plan within the budget captures more."""


class Weighed(NamedTuple):
    """Components of a weight's adapter."""

    gains: Tensor
    """(rank,) fp64, descending: what each is worth."""
    svd: TruncatedSVD
    """Of what the adapter is to capture, so that nobody decomposes it again: of the weight, or of what its format
    leaves over, in the metric of the moment."""


def weighed_components(
    W: Tensor,
    rank: int,
    *,
    quantization: Quantization | None = None,
    moment: Tensor | None = None,
    tolerance: float = TOLERANCE,
    algorithm: Algorithm = "auto",
    seed: int = 0,
    largest: float | None = None,
) -> Weighed:
    """What the first components of a weight's adapter are worth, and the SVD that they come from.

    Args:
        W: (out, in), any float dtype.
        rank: how many, 1 to min(out, in).
        quantization: the residual's format, for the error that it leaves; None for the energy of W.
        moment: (in, in) second moment of the layer's input, for errors as its output has them; None for all alike.
        tolerance, algorithm, seed: of the SVD, see `truncated_svd`.
        largest: W's largest magnitude where it is known, which saves a look at every entry.
    """
    X = _to_capture(W, quantization)
    known = largest if quantization is None and moment is None else None
    scale = 1.0
    if moment is not None:
        # the metric is normalised, and weights are compared with each other here
        scale = float(moment.diagonal().double().mean())
        X = metric(moment.to(X.device), X.shape[1], damping=DAMPING).apply(X)
    svd = decompose(X, rank, tolerance, algorithm, seed, largest=known)
    return Weighed(scale * svd.S.double().square().cpu(), svd)


def total_gain(W: Tensor, *, quantization: Quantization | None = None) -> float:
    """What all components of a weight together are worth, of which `weighed_components` finds the first: a squared
    Frobenius norm."""
    return float(_to_capture(W, quantization).double().square().sum())


def _to_capture(W: Tensor, quantization: Quantization | None) -> Tensor:
    """W, or what its format leaves over, (out, in) fp32."""
    X = W.detach().float()
    return X if quantization is None else X - quantize_matrix(X, quantization, W.dtype).dequantize().float()


def plan_ranks(gains: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, *, least: int = 1) -> RankPlan:
    """The ranks that capture most under a budget.

    Args:
        gains: name -> (most,) what each component is worth, descending.
        costs: name -> parameters that each of its components costs.
        budget: parameters of all adapters together.
        least: rank that every weight gets, at least 1.

    Returns:
        The plan; see above for when it is optimal.

    Raises:
        ConfigError: the budget does not suffice for the least ranks.
    """
    needed = sum(least * cost for cost in costs.values())
    if budget < needed:
        raise ConfigError(
            f"rank_budget is {budget}; {len(costs)} weights at rank {least} take {needed} parameters, so give at least "
            "that many, or narrow target_modules"
        )
    values = {name: each.tolist() for name, each in gains.items()}
    ranks = dict.fromkeys(values, least)
    left = budget - needed
    captured = sum(sum(each[:least]) for each in values.values())
    bound: float | None = None
    # ties go to the weight that comes first
    queue = [
        (-each[least] / costs[name], i, name) for i, (name, each) in enumerate(values.items()) if len(each) > least
    ]
    heapq.heapify(queue)
    while queue:
        ratio, i, name = heapq.heappop(queue)
        if costs[name] > left:
            bound = captured - ratio * left if bound is None else bound
            continue
        gain = values[name][ranks[name]]
        captured, left = captured + gain, left - costs[name]
        ranks[name] += 1
        if ranks[name] < len(values[name]):
            heapq.heappush(queue, (-values[name][ranks[name]] / costs[name], i, name))
    return RankPlan(ranks, budget - left, budget, captured, captured if bound is None else bound)


def uniform_plan(gains: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> RankPlan:
    """The largest rank that all weights can have alike under a budget, for comparison; smaller where one has fewer.

    Raises:
        ConfigError: the budget does not suffice for rank 1.
    """
    plan = plan_ranks({name: torch.ones(1) for name in gains}, costs, budget)
    rank = 1
    while True:
        ranks = {name: min(rank + 1, len(each)) for name, each in gains.items()}
        if ranks == plan.ranks or sum(r * costs[name] for name, r in ranks.items()) > budget:
            break
        plan, rank = RankPlan(ranks, 0, budget, 0.0, 0.0), rank + 1
    captured = sum(float(gains[name][:r].sum()) for name, r in plan.ranks.items())
    cost = sum(r * costs[name] for name, r in plan.ranks.items())
    return RankPlan(plan.ranks, cost, budget, captured, captured)
