"""Stage: on the device the function is the base's at step 0, and stays the trained one wherever it goes.

A small Llama is adapted, trained for two steps, saved, loaded into a fresh base, exported as a LoRA that plain PEFT
loads, and merged. At each station logits are compared with what they should be, by ‖a − b‖ / ‖b‖, with a bound that the
dtype allows.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged, load, reference

from .context import Context
from .models import LINEARS, random_llama, tokens

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative distance of logits that rounding in a forward of a few layers may make, by the dtype of the weights."""
RATE = 1e-3
"""Learning rate of the two steps: visible, and far from divergence."""
MOVED = 1e-3
"""What training must have changed at least, so that the comparisons after it say something."""


def run(context: Context) -> None:
    """Compare at every station, for both dtypes and placements.

    Raises:
        AssertionError: some distance is beyond its bound; all are recorded before.
    """
    for dtype in BOUNDS:
        for placement in ("residual", "offset"):
            name = f"{str(dtype).removeprefix('torch.')}, {placement}"
            context.attempt(name, stations, context, dtype, placement)
            gc.collect()
    context.attempt("same bits twice", deterministic, context)
    beyond = [
        f"{name}: {station} {found['distance']}"
        for name, stops in context.figures.items()
        for station, found in stops.items()
        if isinstance(found, dict) and not found.get("ok", True)
    ]
    assert not beyond, "; ".join(beyond)


def stations(context: Context, dtype: torch.dtype, placement: Any) -> dict[str, Any]:
    """Station -> distance, bound and whether it is within; and the seconds of all."""
    start = time.perf_counter()
    sizes, device = context.sizes, context.device
    batch = tokens(sizes.checked, 2, 32, device)
    found: dict[str, Any] = {}

    def base() -> Any:
        return random_llama(sizes.checked, device, dtype)

    def compare(station: str, logits: Tensor, wanted: Tensor) -> None:
        distance = float(torch.dist(logits.double(), wanted.double()) / torch.linalg.vector_norm(wanted.double()))
        found[station] = {"distance": distance, "bound": BOUNDS[dtype], "ok": distance <= BOUNDS[dtype]}

    start_logits = logits_of(base(), batch)
    config = PissaConfig(rank=sizes.trained_rank, target_modules=LINEARS, placement=placement)
    model = adapt(base(), config)
    compare("step 0", logits_of(model, batch), start_logits)
    train(model, batch)
    trained = logits_of(model, batch)
    moved = float(torch.dist(trained.double(), start_logits.double()) / start_logits.double().norm())
    found["training moved it"] = {"distance": moved, "bound": f"at least {MOVED}", "ok": moved >= MOVED}
    with reference(model):
        compare("reference after training", logits_of(model, batch), start_logits)
    with tempfile.TemporaryDirectory() as folder:
        saved, lora, merged = (Path(folder) / name for name in ("saved", "lora", "merged"))
        model.save_pretrained(str(saved))
        compare("saved and loaded", logits_of(load(saved, base()), batch), trained)
        export_lora(model, lora)
        compare("LoRA in plain PEFT", logits_of(PeftModel.from_pretrained(base(), str(lora)), batch), trained)
        export_merged(model, merged)
        again: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
        compare("merged", logits_of(again.to(device), batch), trained)
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def deterministic(context: Context) -> dict[str, Any]:
    """Whether the same weights, configuration and seed give the same adapter, bit for bit."""
    config = PissaConfig(rank=context.sizes.trained_rank, target_modules=LINEARS)
    pair = [
        {name: value.cpu() for name, value in adapt(model, config).named_parameters() if "lora_" in name}
        for model in (random_llama(context.sizes.checked, context.device, torch.bfloat16) for _ in range(2))
    ]
    apart = [name for name, value in pair[0].items() if not torch.equal(value, pair[1][name])]
    return {"adapters": {"distance": len(apart), "bound": 0, "ok": not apart}}


@torch.no_grad()
def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """(rows, length, vocabulary) in evaluation mode; the mode is put back."""
    training = model.training
    logits = model.eval()(input_ids=batch).logits
    model.train(training)
    return logits


def train(model: nn.Module, batch: Tensor) -> None:
    """Two steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
