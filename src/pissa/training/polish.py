"""A short polish of a quantised start: the codes stay, and the factors learn what the full model puts out.

    min over all A, B of  Σ_t ‖h_t − h*_t‖² / Σ_t ‖h*_t‖²         h, h*: last hidden states, quantised and full

A fit layer by layer sees what its own layer gets wrong; this sees what all of them get wrong together, and each can
make up for the others (RILQ, arXiv 2412.01129). The text needs no labels. Some of it is held out: the error on that is
what is reported, and a polish that does not lower it is taken back. Adam, its rate a cosine from `RATE` to 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..calibrate.blocks import quiet
from ..checkpoint.disk.write import output_files
from ..errors import ConfigError
from ..live.record import record_of
from ..live.state import INITIAL, TRAINABLE, adapter_layers, parameters_of
from ..provenance import fingerprint

RATE = 1e-4
"""Adam's rate at the first step."""
HELD_OUT = 2
"""Batches that are measured on and not learned from."""
SAVE_EVERY = 8
"""Steps between two states on the disk."""


@dataclass(frozen=True)
class Polish:
    """What a polish did."""

    steps: int
    """Each on one batch."""
    tokens: int
    """How many were learned from."""
    error_before: float
    """`‖h − h*‖ / ‖h*‖` on the batches held out."""
    error_after: float
    """The same in the end."""


def hidden_states(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """What a transformers model's body puts out for each batch: (rows, tokens, hidden) fp32, on the CPU.

    Raises:
        ConfigError: it puts out no `last_hidden_state`.
    """
    with quiet(model):
        return [_states(model, batch).float().cpu() for batch in batches]


def polish(
    model: PeftModel,
    batches: Sequence[Mapping[str, Any]],
    targets: Sequence[Tensor],
    steps: int,
    *,
    state: Path,
    progress: Callable[[int, float], None] = lambda step, error: None,
) -> Polish:
    """Train the factors of an adapted model at step 0, which are its initial adapter from then on.

    Args:
        model: with a quantised residual; its codes and all else but the factors stay as they are.
        batches: keyword arguments of the model's forward, at least two.
        targets: what `hidden_states` gave for them before the model was adapted.
        steps: how many; each learns from one batch.
        state: file from which a polish that was stopped goes on, to the same factors.
        progress: called after each step with its number and the error on its batch.

    Raises:
        ConfigError: a single batch.
    """
    held, learned = _parted(len(batches))
    parameters = [each for layer in adapter_layers(model).values() for each in parameters_of(layer, TRAINABLE)]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=RATE)

    def error(numbers: Sequence[int]) -> Tensor:
        return _error(model.get_base_model(), [batches[i] for i in numbers], [targets[i] for i in numbers])

    mark = f"{steps} {len(batches)} {fingerprint({str(i): p for i, p in enumerate(start)})}"
    with quiet(model):
        before = float(error(held).sqrt())
        for step in range(_resume(state, mark, parameters, optimizer), steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                found = error([learned[step % len(learned)]])
            _descend(found, parameters, optimizer)
            progress(step + 1, float(found.detach().sqrt()))
            if (step + 1) % SAVE_EVERY == 0:
                _save(state, mark, step + 1, parameters, optimizer)
        optimizer.zero_grad()
        after = float(error(held).sqrt())
        if not after < before:
            _copy(start, parameters)
    tokens = sum(_mask(batches[number], targets[number]).sum() for number in learned[:steps])
    made = Polish(steps, int(tokens), before, min(after, before))
    _settle(model, made)
    return made


def _parted(count: int) -> tuple[list[int], list[int]]:
    """The numbers of the batches that are held out, at even distances, and of the others."""
    if count < 2:
        raise ConfigError("polish holds a part of its text out, and there is one batch: give more rows or more text")
    out = min(HELD_OUT, count - 1)
    held = [(2 * i + 1) * count // (2 * out) for i in range(out)]
    return held, [number for number in range(count) if number not in held]


def _descend(error: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One step; layers after the last hidden states (a head, a pooler) have no gradient and stay."""
    gradients = torch.autograd.grad(error, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if "use_cache" in inspect.signature(body.forward).parameters:
        inputs["use_cache"] = False
    found = body(**inputs)
    if getattr(found, "last_hidden_state", None) is None:
        raise ConfigError(f"{type(body).__name__} puts out no last hidden states to learn; leave polish out")
    return found.last_hidden_state


def _error(model: nn.Module, batches: Sequence[Mapping[str, Any]], targets: Sequence[Tensor]) -> Tensor:
    """`Σ ‖h − h*‖² / Σ ‖h*‖²` over the tokens that are no padding."""
    apart: Any = 0.0
    whole: Any = 0.0
    for batch, target in zip(batches, targets, strict=True):
        found = _states(model, batch).float()
        mask = _mask(batch, target).to(found.device)[..., None]
        target = target.to(found.device)
        apart = apart + ((found - target).square() * mask).sum()
        whole = whole + (target.square() * mask).sum()
    return apart / whole


def _mask(batch: Mapping[str, Any], target: Tensor) -> Tensor:
    """(rows, tokens): 1 where a token counts."""
    mask = batch.get("attention_mask")
    return mask.cpu() if mask is not None and mask.shape == target.shape[:-1] else torch.ones(target.shape[:-1])


def _save(path: Path, mark: str, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, held in moments.items() for name, value in held.items()}
    tensors |= {f"{i}.factor": parameter.detach() for i, parameter in enumerate(parameters)}
    with output_files(path.parent, last=path.name) as partial:
        save_file(tensors, partial / path.name, {"mark": mark, "step": str(step)})


def _resume(path: Path, mark: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with: 0 where there is no state, or one of another start."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
        if found.get("mark") != mark:
            return 0
        held: dict[int, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 -- it is no dict
            number, _, name = key.partition(".")
            held.setdefault(int(number), {})[name] = file.get_tensor(key)
    _copy([held[i].pop("factor") for i in range(len(parameters))], parameters)
    moments = {number: state for number, state in held.items() if state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(found["step"])


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def _settle(model: PeftModel, made: Polish) -> None:
    """Make the factors the initial adapter, and put into the certificates how far from the weight that may be."""
    record = record_of(model)
    assert record is not None
    for name, layer in adapter_layers(model).items():
        (A, B), (A0, B0) = parameters_of(layer, TRAINABLE), parameters_of(layer, INITIAL)
        left, right = torch.cat([B, -B0], -1).double(), torch.cat([A, A0], -2).double()
        moved = float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt()) * layer.scaling[TRAINABLE]
        certificate = record.certificates[name]
        if certificate.quantization_error:
            factor = 1 + moved / certificate.quantization_error
            plain = 100 - (certificate.quantization_reduction or 0.0)
            record.certificates[name] = replace(
                certificate,
                rounding=certificate.rounding * factor,
                quantization_error=certificate.quantization_error * factor,
                quantization_reduction=100 - plain * factor,
            )
        _copy((A, B), (A0, B0))
    record.polish = asdict(made)
