"""Stage: the training steps of `training.py` with the model in NF4, where bitsandbytes is installed.

QLoRA as it is, and PiSSA with one iteration of QPiSSA; the seconds that it takes to quantise stand beside the steps.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from pissa import PissaConfig, adapt, quantization_preset, restore
from pissa.config import Method

from .context import Context, Skipped
from .models import LINEARS, random_llama
from .training import begin, both

WAYS: dict[str, tuple[Method, str]] = {"QLoRA": ("lora-kaiming", "qlora"), "QPiSSA-1": ("pissa", "qpissa-1")}
"""Name -> method of the adapter, and preset of the quantisation."""


def run(context: Context) -> None:
    """Quantise and train one way after the other.

    Raises:
        Skipped: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    model: Any = random_llama(context.sizes.trained, context.device, torch.bfloat16)
    begin(context, model)
    for name, (method, preset) in WAYS.items():
        config = PissaConfig(
            rank=context.sizes.trained_rank,
            method=method,
            target_modules=LINEARS,
            quantization=quantization_preset(preset),
        )
        both(context, name, model, lambda bare, config=config: adapt(bare, config), restore)
