"""The list of failures: what a peer does, run here, and what pissa does in its place.

Each entry is a function that runs both, asserts that the failure is there in the peer and absent in pissa, and says in
a few words what was seen. `page.py` makes docs/peers.md of them, `test_peers.py` runs them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pissa import PissaConfig, adapt
from pissa.errors import PissaError


class Seen(NamedTuple):
    """What was seen, in a few words each."""

    peer: str
    ours: str


@dataclass(frozen=True)
class Failure:
    """One row of the page."""

    peer: str
    """Whose failure it is."""
    title: str
    run: Callable[[Any], Seen]
    """Takes a scratch directory."""


FAILURES: list[Failure] = []
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def failure(title: str, peer: str = "PEFT") -> Callable[[Callable[[Any], Seen]], Callable[[Any], Seen]]:
    """Add a function to the list."""

    def register(function: Callable[[Any], Seen]) -> Callable[[Any], Seen]:
        FAILURES.append(Failure(peer, title, function))
        return function

    return register


def by_peft(model: nn.Module, how: Any = "pissa", rank: int = 8, **settings: Any) -> PeftModel:
    """A model adapted by PEFT alone; its generator is the global one, so it is seeded."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=how, **{"target_modules": LINEAR, **settings})
    return get_peft_model(model, config)  # pyright: ignore


def off(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def percent(error: float) -> str:
    """An error for people: rounding noise is called that."""
    return "equal up to rounding" if error < 1e-5 else f"{100 * error:.0f} % off"


def raised(work: Callable[[], object], *kinds: type[Exception]) -> str:
    """The name of the exception that must come."""
    try:
        work()
    except kinds as error:
        return type(error).__name__
    raise AssertionError(f"none of {kinds} was raised")


def preserved_or_refused(model: nn.Module, inputs: Any, targets: list[str]) -> str:
    """Ours on a kind of layer: the function kept and two factors, or one line that names the module."""
    with torch.no_grad():
        before = model(*inputs)
    try:
        adapted = adapt(model, PissaConfig(2, target_modules=targets))
    except PissaError as error:
        assert targets[0].rpartition(".")[2] in str(error) and "\n" not in str(error)
        return "refused by name before anything is changed"
    with torch.no_grad():
        after = adapted(*inputs)
    first = [value[0] if isinstance(value, tuple) else value for value in (before, after)]
    error = off(first[1], first[0])
    assert error < 1e-5 and any(p.requires_grad and p.any() for p in adapted.parameters())
    return "adapted from its principal components, same function"
