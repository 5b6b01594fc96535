"""A training loop in memory, for models that are no causal language models: what `train` does, without its files.

AdamW, unless the caller makes another optimizer, the recipe's warm-up and schedule, gradients clipped to one norm,
everything else left to the caller: what is trained is what requires a gradient, a batch is whatever the loss takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from pissa.errors import ConfigError, DataError, TrainingError

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: dict[Schedule, str] = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Ours -> transformers' name of the schedule that begins with a warm-up."""


@dataclass(frozen=True)
class Fit:
    """What was seen while a model was trained; step 1 is the first entry."""

    losses: list[float]
    """The loss of each step's batch, before the step."""
    grad_norms: list[float]
    """The norm of each step's whole gradient, before clipping."""


class Diverged(TrainingError):
    """The loss or the gradient is not finite."""

    def __init__(self, message: str, seen: Fit) -> None:
        super().__init__(message)
        self.seen = seen
        """The steps before."""


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    learning_rate: float,
    steps: int,
    schedule: Schedule = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    optimizer: Callable[[Any, float], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Train what requires a gradient, one batch a step.

    Args:
        model: in the mode in which it is to be trained; its parameters are changed. It stays on its device, to which
            the tensors of a batch are moved.
        batches: at least `steps` of them: tensors, or tuples or mappings of tensors.
        loss: of the model on a batch, a scalar.
        learning_rate: at its peak.
        steps: optimizer steps.
        schedule: how the rate falls after warm-up.
        warmup_ratio: share of the steps in which it rises, as in `Recipe`.
        weight_decay: AdamW's, of every trained parameter.
        max_grad_norm: gradients are clipped to it; 0 for no clipping.
        optimizer: makes one of the model and the learning rate; None for AdamW.
        after_step: called with the number of steps done, after each.

    Raises:
        ConfigError: a setting out of its range, or nothing to train.
        DataError: the batches end too early.
        Diverged: the loss or the gradient is not finite; the message names the step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check(trained, learning_rate, steps, schedule)
    if optimizer is None:
        moving: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    else:
        moving = optimizer(model, learning_rate)
    rates = get_scheduler(SCHEDULES[schedule], moving, math.ceil(steps * warmup_ratio), steps)
    losses: list[float] = []
    norms: list[float] = []
    source = iter(batches)
    device = trained[0].device
    for step in range(1, steps + 1):
        batch = next(source, None)
        if batch is None:
            raise DataError(f"the batches ended after {step - 1} of {steps} steps; give more, or train fewer steps")
        found = loss(model, on_device(batch, device))
        moving.zero_grad(set_to_none=True)
        found.backward()
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf)
        losses.append(float(found.detach()))
        norms.append(float(norm))
        if not math.isfinite(losses[-1]) or not math.isfinite(norms[-1]):
            raise Diverged(
                f"loss {losses[-1]:g}, gradient norm {norms[-1]:g} in step {step}; lower the learning rate "
                f"({learning_rate:g})",
                Fit(losses[:-1], norms[:-1]),
            )
        moving.step()
        rates.step()
        if after_step is not None:
            after_step(step)
    return Fit(losses, norms)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(on_device(value, device) for value in batch)
    return batch


def _check(trained: list[nn.Parameter], learning_rate: float, steps: int, schedule: str) -> None:
    if not trained:
        raise ConfigError("no parameter of the model requires a gradient; adapt it, or call requires_grad_()")
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate is {learning_rate!r}; give a positive number")
    if steps < 1:
        raise ConfigError(f"steps is {steps!r}; give at least 1")
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule is {schedule!r}; allowed: {', '.join(SCHEDULES)}")
