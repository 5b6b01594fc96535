"""Second moments of layer inputs: which directions a weight's errors are seen in.

    M = E[xᵀx] (in, in)         over the tokens x (1, in) that reach a layer;    E ‖x Eᵀ‖² = tr(E M Eᵀ)

A model's moments together can be larger than the model. So the text goes through the model once, block by block
(`blocks.py`): between blocks only its hidden states are kept, and a block's moments are handed over and forgotten
before the next block's begin. Layers that are given the same tensor (q, k, v; gate, up) have one moment between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TargetError, listed
from .blocks import Sweep, Trace, agree, block_names, block_of, listening, probe, quiet, run

log = logging.getLogger(__name__)

ROWS = 1024
"""Tokens whose products are summed in fp32; their sums are summed in fp64."""
COLUMNS, PARTS = 64, 4
"""A sum is made in so many parts of at least so many columns."""
GROUP_BYTES = 1 << 30
"""Moments collected at a time where a model has no blocks; always at least one."""


@dataclass(frozen=True)
class Moment:
    """The second moment of one input."""

    names: tuple[str, ...]
    """The layers that are given this input."""
    matrix: Tensor
    """E[xᵀx]: (in, in) fp32, on the layer's device."""
    tokens: int
    """How many tokens it is the mean over."""


class Accumulator:
    """A running sum of `xᵀx`, fp64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add an input (..., in); positions where the mask is 0 are padding."""
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None and mask.shape == x.shape[:-1]:
            rows = rows[mask.to(x.device).reshape(-1) != 0]
        if self.total is None:
            self.total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        step = max(COLUMNS, -(-x.shape[-1] // PARTS))
        for part in rows.split(ROWS):
            part = part.float()
            for left in range(0, x.shape[-1], step):  # what lies above the diagonal is the same as what lies below
                columns = part[:, left : left + step]
                self.total[left:, left : left + step].add_(part[:, left:].mT @ columns)
        self.tokens += len(rows)

    def take(self, names: Sequence[str]) -> Moment:
        """The moment; the sum is given up."""
        if self.total is None or self.tokens == 0:
            raise DataError(
                f"no token of the calibration text reached {listed(names)}; give more text, exclude these "
                "layers, or fit to no text (--calibration none)"
            )
        matrix = self.total.div_(self.tokens).float().tril_()
        matrix += matrix.tril(-1).mT
        self.total = None
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(
                f"the inputs of {listed(names)} overflow on the calibration text; load the model in bfloat16 or float32"
            )
        return Moment(tuple(names), matrix, self.tokens)


def second_moments(model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Iterable[str]) -> Iterator[Moment]:
    """The second moment of every layer's input, in the order in which the model runs.

    The text passes through the model once (and its first row once more, to learn the model's shape). The moments of
    one block are in memory at a time; whoever consumes them keeps what it needs. Later blocks are fed by what the model
    returned before a moment was handed over, so the consumer may change the weights of layers that it has been given.

    Args:
        model: any module; it is left as it was, also where the iteration is given up.
        batches: keyword arguments of the model's forward. Where `attention_mask` is 0, positions do not count.
        names: modules of the model whose first argument is an input (..., in): linear layers.

    Yields:
        Moments; each name is in exactly one of them.

    Raises:
        TargetError: names that the model does not have.
        DataError: no batches, a layer that no token reaches, or inputs that overflow.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import second_moments
        >>> model = AutoModelForCausalLM.from_pretrained("base")
        >>> batches = [{"input_ids": torch.tensor([[5, 6, 7, 8]])}]
        >>> for moment in second_moments(model, batches, ["model.layers.0.self_attn.q_proj"]):
        ...     print(moment.names, moment.tokens, moment.matrix.shape[0] == model.config.hidden_size)
        ('model.layers.0.self_attn.q_proj',) 4 True
    """
    batches, names = first_row_apart(list(batches)), list(dict.fromkeys(names))
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise TargetError(f"the model has no layer {listed(missing, 20)}; names come from model.named_modules()")
    if not batches:
        raise DataError("there are no calibration batches; give at least one")
    if not names:
        return
    blocks = block_names(model, names)
    trace = probe(model, batches[0], names, blocks)
    blocks = [name for name in blocks if name in trace.calls]
    groups = groups_of(names, trace)
    done: set[str] = set()
    for moment in by_block(model, batches, blocks, trace, groups):
        if moment is None:
            log.warning("the model's blocks depend on more than the block before; its moments take several passes")
            break
        done.update(moment.names)
        yield moment
    yield from in_passes(model, batches, [group for group in groups if group[0] not in done])


def first_row_apart(batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same rows, the first one a batch of its own where batches are rows of tensors: it goes through the model once
    more than the others."""
    values = list(batches[0].values()) if batches else []
    if not values or not all(isinstance(value, Tensor) and value.ndim > 1 for value in values):
        return batches
    if {len(value) for value in values} == {1} or len({len(value) for value in values}) > 1:
        return batches
    first, others = ({key: value[rows] for key, value in batches[0].items()} for rows in (slice(1), slice(1, None)))
    return [first, others, *batches[1:]]


def groups_of(names: Sequence[str], trace: Trace) -> list[list[str]]:
    """Layers that share an input, in the order of the first of them; one that did not run is on its own."""
    groups: dict[str, list[str]] = {}
    for name in [*trace.shared, *(name for name in names if name not in trace.shared)]:
        groups.setdefault(trace.shared.get(name, name), []).append(name)
    return list(groups.values())


def by_block(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    blocks: Sequence[str],
    trace: Trace,
    groups: Sequence[list[str]],
) -> Iterator[Moment | None]:
    """The moments block by block; None, and an end, where the blocks turn out not to be a row."""
    inside: dict[str | None, list[list[str]]] = {}
    for group in groups:
        inside.setdefault(block_of(group[0], blocks), []).append(group)
    last = {name: position for position, name in enumerate(trace.calls)}
    sweep = Sweep(model, batches, blocks)
    sums: dict[str, Accumulator] = {}
    outside = inside.get(None, [])
    needed = len(trace.calls) if outside else 1 + max((last[b] for b in inside if b is not None), default=-1)
    for position, block in enumerate(trace.calls[:needed]):
        here = inside.get(block, [])
        sums |= {group[0]: Accumulator() for group in here if group[0] not in sums}
        try:
            sample = sweep.advance(hearing(batches, {group[0]: sums[group[0]] for group in here}))
            in_a_row = agree(sample, trace.samples[position])
        except Exception:
            # The whole forward pass went well on this batch, and goes its own way where it does not on others.
            in_a_row = False
        if not in_a_row:
            yield None
            return
        if last[block] == position:
            for group in here:
                yield sums.pop(group[0]).take(group)
    for portion in portions(model, outside):
        sums = {group[0]: Accumulator() for group in portion}
        sweep.finish(hearing(batches, sums))
        for group in portion:
            yield sums.pop(group[0]).take(group)


def in_passes(model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[list[str]]) -> Iterator[Moment]:
    """The moments of any model, a portion at a time, each with a whole pass of the text."""
    for portion in portions(model, groups):
        sums = {group[0]: Accumulator() for group in portion}
        hear = hearing(batches, sums)
        for number, batch in enumerate(batches):
            with quiet(model), listening(model, hear(number)):
                run(model, batch)
        for group in portion:
            yield sums.pop(group[0]).take(group)


def portions(model: nn.Module, groups: Sequence[list[str]]) -> Iterator[list[list[str]]]:
    """As many groups at a time as have moments of `GROUP_BYTES` together, and at least one."""
    portion, size = [], 0
    for group in groups:
        needed = width(model, group)
        if portion and size + needed > GROUP_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(group)
        size += needed
    if portion:
        yield portion


def width(model: nn.Module, group: Sequence[str]) -> int:
    """Bytes of a layer's moment in fp64, at most."""
    weight = getattr(model.get_submodule(group[0]), "weight", None)
    return 8 * max(weight.shape) ** 2 if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def hearing(
    batches: Sequence[Mapping[str, Any]], sums: Mapping[str, Accumulator]
) -> Callable[[int], Mapping[str, Callable[[Tensor], None]]]:
    """For each batch: layer -> function that adds the layer's input to its sum."""

    def of_batch(number: int) -> Mapping[str, Callable[[Tensor], None]]:
        mask = batches[number].get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        return {name: lambda x, total=total: total.add(x, mask) for name, total in sums.items()}

    return of_batch
