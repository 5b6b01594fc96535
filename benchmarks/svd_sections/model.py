"""Section "model": all linears of SmolLM2, with the residual, against PEFT's initialisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pissa import PissaConfig, adapt

from .rivals import rotated, settle

SMOLLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measure_model(directory: Path, rank: int, repeats: int, exact_repeats: int) -> dict[str, Any]:
    """All linears of SmolLM2: whole initialisations, `adapt` against PEFT's `get_peft_model`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def fresh() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def with_peft(init: str) -> float:
        model = fresh()
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(SMOLLM_LINEARS),
            init_lora_weights=init,  # pyright: ignore
        )
        start = time.perf_counter()
        get_peft_model(model, config)
        return time.perf_counter() - start

    def with_pissa() -> float:
        model = fresh()
        start = time.perf_counter()
        adapt(model, PissaConfig(rank=rank, target_modules=list(SMOLLM_LINEARS)))
        return time.perf_counter() - start

    runs: dict[str, Callable[[], float]] = {
        "pissa.adapt": with_pissa,
        "PEFT, no decomposition": lambda: with_peft(True),  # pyright: ignore
        "PEFT pissa_niter_4": lambda: with_peft("pissa_niter_4"),
        "PEFT pissa_niter_16": lambda: with_peft("pissa_niter_16"),
        "PEFT pissa": lambda: with_peft("pissa"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in rotated(runs, repeat):
            settle()
            if name != "PEFT pissa" or repeat < exact_repeats:
                times[name].append(run())
                print(f"model: {name:24} {times[name][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["pissa.adapt"]
    return {
        "rank": rank,
        "median_seconds": medians,
        "seconds": times,
        "ratio": {k: v / base for k, v in medians.items()},
    }
