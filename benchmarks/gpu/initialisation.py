"""Stage: a whole 7B-shaped bf16 model is initialised by `adapt` and by PEFT: seconds, and memory beyond the model's.

PEFT's `pissa_niter_*` decomposes one weight after the other, so it is timed on some of the decoder's layers and
scaled to all of them; `adapt` and plain LoRA are timed on the whole model, and `adapt` on the same layers as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from pissa import PissaConfig, adapt, restore

from .context import Context
from .measure import extra_memory, release, seconds_of
from .models import LINEARS, random_llama, refill
from .sizes import Sizes


def run(context: Context) -> None:
    """Initialise the model one way after the other; each begins with new weights."""
    sizes, device = context.sizes, context.device
    layers, some = sizes.adapted.layers, sizes.rival_layers
    context.record(rank=sizes.rank, layers=layers)
    model: Any = random_llama(sizes.adapted, device, torch.bfloat16)
    context.record(parameters=sum(parameter.numel() for parameter in model.parameters()))
    runs: dict[str, tuple[Callable[..., Any], int]] = {
        "pissa.adapt": (ours, layers),
        "PEFT LoRA": (theirs(True), layers),
        "PEFT pissa_niter_4": (theirs("pissa_niter_4"), some),
        "pissa.adapt, some layers": (ours, some),
        "PEFT pissa_niter_16": (theirs("pissa_niter_16"), some),
    }
    for seed, (name, (initialise, count)) in enumerate(runs.items()):
        refill(model, seed)
        context.attempt(name, measured, initialise, model, sizes, count, device)
        gc.collect()
        release()


def measured(
    initialise: Callable[..., Any], model: Any, sizes: Sizes, count: int, device: torch.device
) -> dict[str, Any]:
    """Seconds and extra memory of one initialisation of the first `count` layers; the model is unwrapped afterwards."""
    with extra_memory(device) as extra:
        spent, adapted = seconds_of(device, lambda: initialise(model, sizes.rank, list(range(count))))
    figures: dict[str, Any] = {
        "seconds": spent,
        "layers": count,
        "seconds_all_layers": spent * sizes.adapted.layers / count,
        "extra_gib": extra.gib,
    }
    record = getattr(adapted, "pissa", None)
    if record is not None:
        certificates = record.certificates.values()
        figures["largest_certified_loss"] = max(one.captured_energy_loss for one in certificates)
        restore(adapted)
    else:
        adapted.unload()
    return figures


def ours(model: Any, rank: int, layers: list[int]) -> Any:
    """`adapt` of the linears of these layers."""
    pattern = rf".*\.({'|'.join(map(str, layers))})\..*({'|'.join(LINEARS)})"
    return adapt(model, PissaConfig(rank=rank, target_modules=pattern))


def theirs(initialisation: Any) -> Callable[..., Any]:
    """PEFT's wrapping with one of its initialisations."""

    def initialise(model: Any, rank: int, layers: list[int]) -> Any:
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=LINEARS,
            layers_to_transform=layers,
            init_lora_weights=initialisation,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)

    return initialise
