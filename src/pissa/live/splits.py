"""The splits of all targets of a live model: in its order, or as moments or gradients of its data arrive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.gradients import weight_gradients
from ..calibrate.moments import Moment
from ..config import PissaConfig
from ..errors import DataError, listed
from ..split import Split, Weight, split_each
from .targets import Target

MOMENT_BYTES = 1 << 28
"""Streamed moments held at a time, at most."""
WAITING = 8
"""Weights for each thread that are split side by side once their moments are there: enough to keep all threads at work,
few enough for the first to be done soon."""


def splits_of(
    targets: list[Target], config: PissaConfig, moments: Mapping[str, Tensor] | Iterable[Moment] | None
) -> Iterator[tuple[Target, list[Split]]]:
    """Every target with the split of its weight, or of each of its experts': in the model's order, or as streamed
    moments arrive."""
    if moments is None:
        yield from _split_group(targets, config, {})
        return
    waiting = {target.name: target for target in targets}
    for group in _groups(moments):
        here = [waiting.pop(name) for name in group if name in waiting]
        yield from _split_group(here, config, group)
    if waiting:
        raise DataError(f"no second moment is given for {listed(waiting)}; give one for every target, or none")


def scored_splits(
    model: nn.Module, targets: list[Target], config: PissaConfig, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Target, list[Split]]]:
    """The same by the gradients of a loss, of which some are in memory at a time."""
    by_key = {target.weight_key: target for target in targets}
    for gradients in weight_gradients(model, batches, by_key):
        yield from _split_group([by_key[key] for key in gradients], config, {}, gradients)


def _groups(moments: Mapping[str, Tensor] | Iterable[Moment]) -> Iterator[Mapping[str, Tensor]]:
    """Moments by module name: as many at a time as keep all threads at work and fit into MOMENT_BYTES, at least those
    of one input."""
    if isinstance(moments, Mapping):
        yield moments  # pyright: ignore[reportReturnType]
        return
    group: dict[str, Tensor] = {}
    size = 0
    for moment in moments:
        group |= dict.fromkeys(moment.names, moment.matrix)
        size += moment.matrix.nbytes
        if size >= MOMENT_BYTES or len(group) >= WAITING * torch.get_num_threads():
            yield group
            group, size = {}, 0
    yield group


def _split_group(
    targets: list[Target],
    config: PissaConfig,
    moments: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Target, list[Split]]]:
    weights = [
        weights_of(
            target,
            target.place.matrices(),
            config,
            moments.get(target.name),
            target.kind.matrices(gradients[target.weight_key]) if gradients is not None else None,
        )
        for target in targets
    ]
    splits = split_each([weight for group in weights for weight in group])
    return ((target, [next(splits) for _ in group]) for target, group in zip(targets, weights, strict=True))


def weights_of(
    target: Target,
    matrices: Tensor,
    config: PissaConfig,
    moment: Tensor | None = None,
    gradient: Tensor | None = None,
) -> list[Weight]:
    """What `split_each` takes for one target: its weight, or those of its experts, each with a name of its own.

    Args:
        matrices: (…, out, in), as `Kind.matrices` gives them.
        moment: (in, in) second moment of the input.
        gradient: of the loss, in the shape of the matrices.
    """
    own = config.for_module(target.rank, target.alpha)
    if matrices.ndim == 2:
        largest = None if target.largest is None else target.largest[0]
        svd = None if target.svds is None else target.svds[0]
        return [Weight(matrices, own, target.weight_key, moment, gradient, largest, svd)]
    return [
        Weight(
            matrix,
            own,
            f"{target.weight_key}.{i}",
            moment,
            None if gradient is None else gradient[i],
            None if target.largest is None else target.largest[i],
            None if target.svds is None else target.svds[i],
        )
        for i, matrix in enumerate(matrices)
    ]
