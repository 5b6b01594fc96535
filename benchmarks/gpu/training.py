"""Stage: training steps of an 8B-shaped bf16 model with adapters on all linears, with and without checkpointing.

Tokens a second, peak memory, and the share of the device's own bf16 rate that they are at 4N FLOP a token: two a
parameter forward, two more for the gradients of activations, none for those of frozen weights; N counts all parameters
but the input embedding. What checkpointing computes twice does not count. TRL's trainer runs the same LoRA where it is
installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pissa import PissaConfig, adapt, restore
from pissa.lab.memory import peak_gib, start_peak

from .context import Context
from .measure import product_rate, release, seconds_of
from .models import LINEARS, in_products, random_llama, tokens
from .trl_steps import trl_step_seconds

FLOPS = 4
"""A parameter and token."""


def run(context: Context) -> None:
    """Train with one adapter after the other on one model, each with and without gradient checkpointing."""
    model: Any = random_llama(context.sizes.trained, context.device, torch.bfloat16)
    begin(context, model)
    for name, (wrap, unwrap) in adapters(context.sizes.trained_rank).items():
        both(context, name, model, wrap, unwrap)
    context.attempt("TRL + PEFT LoRA", trl_figures, context, model)


def begin(context: Context, model: nn.Module) -> None:
    """Record what figures are relative to."""
    sizes = context.sizes
    context.record(
        rank=sizes.trained_rank,
        tokens=sizes.rows * sizes.length,
        parameters_in_products=in_products(model),
        bf16_flops=product_rate(context.device, sizes.product),
    )


def adapters(rank: int) -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """Name -> what wraps the model, and what takes the adapter off again."""

    def ours(**settings: Any) -> Callable[[Any], Any]:
        return lambda model: adapt(model, PissaConfig(rank=rank, target_modules=LINEARS, **settings))

    def lora(model: Any) -> Any:
        return get_peft_model(model, lora_config(rank))

    return {
        "PiSSA": (ours(), restore),
        "PEFT LoRA": (lora, lambda adapted: adapted.unload()),
        "PiSSA, offset": (ours(placement="offset"), restore),
    }


def lora_config(rank: int) -> LoraConfig:
    """PEFT's plain LoRA on the same linears."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="CAUSAL_LM")


def both(context: Context, name: str, model: Any, wrap: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> None:
    """Figures of one adapter with and without checkpointing; the model is bare again afterwards."""
    setup, adapted = seconds_of(context.device, lambda: wrap(model))
    context.record(**{f"{name}: seconds to set up": setup})
    for checkpointing in (True, False):
        context.attempt(label(name, checkpointing), step_figures, context, adapted, checkpointing)
        adapted.zero_grad(set_to_none=True)
        release()
    unwrap(adapted)
    release()


def label(name: str, checkpointing: bool) -> str:
    """The figures' key."""
    return f"{name}, {'with' if checkpointing else 'without'} checkpointing"


def step_figures(context: Context, model: Any, checkpointing: bool) -> dict[str, Any]:
    """Seconds of a training step, the median of some after a first one, and what follows from them."""
    sizes, device = context.sizes, context.device
    batch = tokens(sizes.trained, sizes.rows, sizes.length, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    start_peak()
    try:
        times = [seconds_of(device, step)[0] for _ in range(sizes.steps + 1)]
        return figures(context, statistics.median(times[1:]))
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def figures(context: Context, seconds: float) -> dict[str, Any]:
    """A step's seconds as tokens a second and as a share of the device's rate; and the peak memory so far."""
    known = context.figures
    rate = known["tokens"] / seconds
    return {
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "share_of_bf16_rate": FLOPS * known["parameters_in_products"] * rate / known["bf16_flops"],
        "peak_gib": peak_gib(),
    }


def trl_figures(context: Context, model: Any) -> dict[str, Any]:
    """The same LoRA by TRL's trainer, without checkpointing.

    Raises:
        Skipped: TRL or datasets are not installed.
    """
    start_peak()
    return figures(context, trl_step_seconds(context, model, lora_config(context.sizes.trained_rank)))
