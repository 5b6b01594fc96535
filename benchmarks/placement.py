"""What a placement costs: a training step's time and memory, against plain LoRA of the same rank.

    python benchmarks/placement.py [MODEL_DIR] [--quick] [--ranks 16] [--out DIRECTORY]

Without MODEL_DIR, SmolLM2-135M. One step each in turn, in an order that rotates: forward, backward, AdamW, in CPU
seconds of one thread. Memory is counted, not sampled: adapters, their gradients and AdamW's moments, and what autograd
keeps for the backward pass beyond the model's own weights. Writes `placement.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt
from pissa.lab.models import smollm2
from pissa.provenance import hardware, package_versions

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora-kaiming"},
    "residual": {},
    "offset": {"placement": "offset"},
}


def kept_for_backward(model: Any, batch: torch.Tensor) -> int:
    """Bytes of the tensors that a forward keeps for its backward pass, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch).loss
    del loss
    return sum(held.values())


def stepper(source: Path, rank: int, kind: str, batch: torch.Tensor) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that does one step and says how long it took; and what the placement takes of memory."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model: Any = adapt(base, PissaConfig(rank, **KINDS[kind])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [p for name, p in model.named_parameters() if ".pissa_init." in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> float:
        start = time.thread_time()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.thread_time() - start

    size = sum(p.nbytes for p in trained)
    memory = {
        "adapter_gradients_moments_MB": (4 * size + sum(p.nbytes for p in frozen)) / 1e6,
        "kept_for_backward_MB": kept_for_backward(model, batch) / 1e6,
    }
    return step, memory


def measure(source: Path, rank: int, repetitions: int, tokens: tuple[int, int]) -> dict[str, Any]:
    """Median times and memory of every placement at one rank."""
    batch = torch.randint(0, 40000, tokens, generator=torch.Generator().manual_seed(0))
    steppers = {kind: stepper(source, rank, kind, batch) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    for repetition in range(repetitions + 1):
        for kind in order:
            seconds = steppers[kind][0]()
            if repetition:  # the first warms up
                times[kind].append(seconds)
        order = order[1:] + order[:1]
    medians = {kind: median(found) for kind, found in times.items()}
    return {
        kind: {
            "seconds": medians[kind],
            "time_ratio": medians[kind] / medians["lora"],
            **steppers[kind][1],
            "memory_ratio": sum(steppers[kind][1].values()) / sum(steppers["lora"][1].values()),
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("model", nargs="?", type=Path, help="a language model's directory [SmolLM2-135M]")
    parser.add_argument("--quick", action="store_true", help="one rank, one repetition, few tokens; decides nothing")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = options.model or smollm2()
    tokens = (1, 16) if options.quick else (1, 128)
    ranks = [4] if options.quick else [int(rank) for rank in options.ranks.split(",")]
    rows = {}
    for rank in ranks:
        rows[str(rank)] = measure(source, rank, 1 if options.quick else options.repetitions, tokens)
        for kind, row in rows[str(rank)].items():
            figures = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
            print(f"rank {rank} {kind}: {figures}", flush=True)
    document = {
        "settings": {
            "model": options.model.name if options.model else "SmolLM2-135M-Instruct",
            "dtype": "float32",
            "batch": tokens,
            "repetitions": options.repetitions,
            "clock": "CPU seconds of one thread, median",
        },
        "ranks": rows,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "placement.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
