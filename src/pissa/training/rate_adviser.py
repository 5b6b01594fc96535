"""The learning rate that a run is likely to want, measured on a few batches before its first step.

For a rate η the model takes a few steps of AdamW, at η throughout, and its loss on other rows is measured; then all is
put back. The run gets a multiple of the rate at which that loss is lowest:

    η* = argmin L(θ after PROBE_STEPS steps at η)            estimate = MULTIPLE · η*

The steps are those of the run itself (method, rank, LoRA+, clipping), so that they see what decides about its rate: how
large the factors are that a step of Adam changes by η whatever the gradient, and how curved the loss is along it. One
step is not enough: LoRA's first step moves B alone, since the gradient of A is zero at B = 0, and the best first step
is up to 2.2 times the best rate of a run under LoRA and a third of it under PiSSA, which moves both factors at once.

MULTIPLE is above 1 because a run's rate falls; it was found on some settings and tried on others
(benchmarks/adviser.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data.encode import IGNORED, Collator, Encoded
from ..errors import TrainingError
from ..live.adalora import penalty
from ..live.state import active_adapter_name
from .engine import micro_batch
from .loss import response_loss
from .optimizer import trained_groups
from .rate_search import next_on_grid, vertex
from .recipe import Recipe

MULTIPLE = 1.2
"""Estimate over η*: the geometric mean of swept optimum / η* over the benchmark's calibration settings, 1.17."""
PROBE_STEPS, PROBE_ROWS, MEASURED_ROWS = 4, 16, 16
"""Steps at each rate, rows of a step at most, and rows on which the loss is measured at most."""
START, SMALLEST, LARGEST = 1e-3, 1e-7, 10.0
"""Where the search for η* begins, and its bounds."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Advice:
    """An estimate and what it rests on."""

    learning_rate: float
    """Two digits."""
    best_probe: float
    """η*."""
    loss: float
    """Nats per response token before any step, on the rows that are measured."""
    tried: list[tuple[float, float | None]]
    """Rates and the losses after their steps; None where the loss is no number any more."""
    rows: int
    """Of the data that were looked at."""


@dataclass(frozen=True)
class ProbeData:
    """What the estimate looks at."""

    steps: list[list[Batch]]
    """Of each step its micro-batches."""
    measured: list[Batch]
    """Micro-batches of other rows, where the data have any."""
    rows: int
    """All together."""


def probe_data(encoded: Encoded, recipe: Recipe, pad_id: int) -> ProbeData:
    """Rows drawn with the recipe's seed: a batch for each step, PROBE_ROWS of it at most, and rows to measure on."""
    draw = torch.Generator().manual_seed(recipe.seed)
    per_step = min(recipe.batch_size, PROBE_ROWS)
    chosen = torch.randperm(len(encoded), generator=draw)[: PROBE_STEPS * per_step + MEASURED_ROWS].tolist()
    apart = min(MEASURED_ROWS, len(chosen) // 2)
    learned, measured = chosen[apart:], chosen[:apart] or chosen

    def batches(indices: list[int]) -> list[Batch]:
        size = micro_batch(recipe)
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [Collator(pad_id)([encoded[index] for index in part]) for part in parts]

    around = [[learned[(step * per_step + i) % len(learned)] for i in range(per_step)] for step in range(PROBE_STEPS)]
    return ProbeData([batches(step) for step in around], batches(measured), len(chosen))


def advise(model: Any, data: ProbeData, recipe: Recipe, *, autocast: bool = False) -> Advice:
    """Estimate the peak learning rate of a run.

    Args:
        model: a causal language model on its device, adapted or with parameters that require a gradient. It computes
            in training mode and is left as it was, bit for bit, as are torch's global generators.
        data: what to look at.
        recipe: of the run; its learning rate is not looked at.
        autocast: compute in bf16 with fp32 weights.

    Raises:
        TrainingError: the loss is not finite before any step, or steps lower it at no rate.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _left_alone(model, trained) as put_back:

        def loss_after(rate: float) -> float:
            put_back()
            if rate:
                _take_steps(model, trained, data.steps, rate, recipe, autocast)
            with torch.no_grad():
                summed = sum(float(_summed_loss(model, batch, autocast)) for batch in data.measured)
            return summed / sum(_tokens(batch) for batch in data.measured)

        best, tried = best_rate(loss_after)
    losses = [(rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried.items()) if rate]
    return Advice(float(f"{MULTIPLE * best:.2g}"), best, tried[0.0], losses, data.rows)


def best_rate(loss_after: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The rate at which a loss is lowest, by the search of `next_on_grid`.

    Args:
        loss_after: the loss after steps at a rate; at 0 without a step.

    Returns:
        That rate, and rate -> loss of what was tried, infinite for what is no number.

    Raises:
        TrainingError: the loss is not finite at 0, or not lower anywhere else.
    """

    def look(rate: float) -> float:
        found = loss_after(rate)
        return found if math.isfinite(found) else math.inf

    untrained = look(0.0)
    if math.isinf(untrained):
        raise TrainingError("the loss is not finite before the first step, so no learning rate can be estimated")
    tried: dict[float, float] = {}
    while (rate := next_on_grid(tried, START, SMALLEST, LARGEST)) is not None:
        tried[rate] = look(rate)
    if min(tried.values()) >= untrained:
        raise TrainingError(
            f"no learning rate lowers the loss ({untrained:.4g}) within {PROBE_STEPS} steps: what some rows teach "
            "does not help with others; give a learning rate as a number"
        )
    return vertex(tried), {0.0: untrained, **tried}


def _take_steps(
    model: Any, trained: Sequence[nn.Parameter], steps: list[list[Batch]], rate: float, recipe: Recipe, autocast: bool
) -> None:
    """AdamW at one rate throughout."""
    optimizer = torch.optim.AdamW(trained_groups(model, rate, recipe.loraplus_ratio), weight_decay=0.0)
    for batches in steps:
        tokens = sum(_tokens(batch) for batch in batches)
        for batch in batches:
            (_summed_loss(model, batch, autocast) / tokens).backward()
        if isinstance(model, PeftModel) and (extra := penalty(model, active_adapter_name(model))) is not None:
            extra.backward()
        nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def _left_alone(model: Any, trained: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """A function that puts the trained values back; at the end they are, as are modes and torch's generators."""
    modes = {module: module.training for module in model.modules()}
    devices = [trained[0].device] if trained[0].device.type == "cuda" else []
    start = [parameter.detach().clone() for parameter in trained]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    try:
        with torch.random.fork_rng(devices):
            model.train()
            yield put_back
    finally:
        put_back()
        for module, mode in modes.items():
            module.training = mode


def _summed_loss(model: Any, batch: Batch, autocast: bool) -> Tensor:
    device = next(model.parameters()).device
    # the same dropout, if any, at every rate
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        inputs = {name: value.to(device) for name, value in batch.items()}
        return response_loss(model, model.get_output_embeddings(), inputs)[0]


def _tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())
