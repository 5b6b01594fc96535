"""A budget of parameters shared out among the targets of a live model (`ranks.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..calibrate.moments import Moment
from ..config import PissaConfig
from ..errors import ConfigError, DataError, listed
from ..ranks import Weighed, plan_ranks, total_gain, weighed_components
from ..split import derive_seed
from .targets import Target


def with_planned_ranks(
    targets: list[Target], config: PissaConfig, moments: Mapping[str, Tensor] | Iterable[Moment] | None
) -> list[Target]:
    """The targets with the ranks that capture most under the configuration's budget, and the SVDs that this took.

    Args:
        targets: each with the largest rank that it may get.
        moments: name -> (in, in) second moment of its input, where energy counts as the output has it.

    Raises:
        ConfigError: the budget is too small for rank 1, or the moments come as a stream.
        DataError: a target without a moment where others have one.
    """
    assert config.rank_budget is not None
    if moments is not None and not isinstance(moments, Mapping):
        raise ConfigError(
            "rank_budget needs every target's moment before the first split; pass moments as a mapping, or leave it out"
        )
    missing = [target.name for target in targets if moments is not None and target.name not in moments]
    if missing:
        raise DataError(f"no second moment is given for {listed(missing)}; give one for every target, or none")
    known: dict[str, Tensor] = dict(moments or {})  # pyright: ignore[reportAssignmentType] -- a mapping by now
    each = [weighed_target(target, config, known.get(target.name)) for target in targets]
    gains = {target.name: total_gains(weighed) for target, weighed in zip(targets, each, strict=True)}
    plan = plan_ranks(gains, {target.name: parameters_per_rank(target) for target in targets}, config.rank_budget)
    # What was decomposed for a metric that the split does not have is another matrix than the split's.
    reusable = moments is None or config.quantization is not None
    return [
        replace(
            target,
            rank=plan.ranks[target.name],
            svds=tuple(matrix.svd for matrix in weighed) if reusable else None,
        )
        for target, weighed in zip(targets, each, strict=True)
    ]


def weighed_target(target: Target, config: PissaConfig, moment: Tensor | None) -> list[Weighed]:
    """The components of each of a target's matrices, as many as its largest rank."""
    matrices = target.place.matrices()
    each = matrices if matrices.ndim == 3 else matrices[None]
    return [
        weighed_components(
            W,
            target.rank,
            quantization=config.quantization,
            moment=moment,
            tolerance=config.tolerance,
            algorithm=config.algorithm,
            seed=derive_seed(config.seed, target.weight_key),
            largest=largest,
        )
        for W, largest in zip(each, target.largest or [None] * len(each), strict=True)
    ]


def total_gains(weighed: list[Weighed]) -> Tensor:
    """What each component of a target is worth, (rank,) fp64: of experts, which share a rank, together."""
    return torch.stack([matrix.gains for matrix in weighed]).sum(0)


def target_gains(target: Target, config: PissaConfig, moment: Tensor | None) -> Tensor:
    """The same for a target that is only looked at, (rank,) fp64."""
    return total_gains(weighed_target(target, config, moment))


def target_total(target: Target, config: PissaConfig) -> float:
    """What all of a target's components are worth, those beyond its largest rank as well."""
    matrices = target.place.matrices()
    each = matrices if matrices.ndim == 3 else matrices[None]
    return sum(total_gain(W, quantization=config.quantization) for W in each)


def parameters_per_rank(target: Target) -> int:
    """What one component of a target's adapter costs."""
    *experts, out, columns = target.place.matrix_shape
    return (out + columns) * (experts[0] if experts else 1)
