"""A budget of parameters shared out among the targets of a live model (`ranks.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ..calibrate.moments import Moment
from ..config import PissaConfig
from ..errors import ConfigError, DataError
from ..ranks import component_gains, plan_ranks, total_gain
from ..split import derive_seed
from .targets import Target


def with_planned_ranks(
    targets: list[Target], config: PissaConfig, moments: Mapping[str, Tensor] | Iterable[Moment] | None
) -> list[Target]:
    """The targets with the ranks that capture most under the configuration's budget.

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
        raise DataError(f"no second moment is given for {', '.join(missing)}; give one for every target, or none")
    known: dict[str, Tensor] = dict(moments or {})  # pyright: ignore[reportAssignmentType] -- a mapping by now
    gains = {target.name: target_gains(target, config, known.get(target.name)) for target in targets}
    plan = plan_ranks(gains, {target.name: parameters_per_rank(target) for target in targets}, config.rank_budget)
    return [replace(target, rank=plan.ranks[target.name]) for target in targets]


def target_gains(target: Target, config: PissaConfig, moment: Tensor | None) -> Tensor:
    """What each of a target's components is worth, (rank,) fp64; of experts, which share a rank, together."""
    matrices = target.place.matrices()
    each = matrices if matrices.ndim == 3 else matrices[None]
    found = [
        component_gains(
            W,
            target.rank,
            quantization=config.quantization,
            moment=moment,
            tolerance=config.tolerance,
            seed=derive_seed(config.seed, target.weight_key),
        )
        for W in each
    ]
    total = found[0]
    for gains in found[1:]:
        total = total + gains
    return total


def target_total(target: Target, config: PissaConfig) -> float:
    """What all of a target's components are worth, those beyond its largest rank as well."""
    matrices = target.place.matrices()
    each = matrices if matrices.ndim == 3 else matrices[None]
    return sum(total_gain(W, quantization=config.quantization) for W in each)


def parameters_per_rank(target: Target) -> int:
    """What one component of a target's adapter costs."""
    *experts, out, columns = target.place.matrix_shape
    return (out + columns) * (experts[0] if experts else 1)
