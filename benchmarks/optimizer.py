"""What a training step costs under the optimizer of products, against AdamW.

    python benchmarks/optimizer.py [--quick] [--ranks 4,16,64] [--tokens 8x200] [--blocks 10] [--out DIR]

The last blocks of a Llama of SmolLM2-135M's sizes over hidden states, all their linears adapted, random weights: what
the blocks below and the vocabulary cost would only hide the difference. One step of each optimizer in turn after one
forward and backward pass, in CPU seconds of one thread. Writes `optimizer.json`.
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
from transformers import LlamaConfig, LlamaModel

from pissa import PissaConfig, SpectralProduct, adapt
from pissa.provenance import hardware, package_versions


def model(blocks: int, rank: int) -> Any:
    """The blocks, adapted; PiSSA's start has no factor that is zero, whose step would be cheaper."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    base = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=blocks, **sizes))
    return adapt(base, PissaConfig(rank)).train()


def timed(action: Callable[[], Any]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def measure(blocks: int, rank: int, tokens: tuple[int, int], repetitions: int) -> dict[str, float]:
    """Medians of one forward and backward pass and of each optimizer's step, and the ratio of whole training steps."""
    trained = model(blocks, rank)
    states = torch.randn(*tokens, 576)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizers = {"adamw": torch.optim.AdamW(parameters, lr=1e-6), "spectral": SpectralProduct(trained, 1e-4)}
    found: dict[str, list[float]] = {"gradients": [], **{name: [] for name in optimizers}}
    for _ in range(repetitions + 1):
        trained.zero_grad()
        found["gradients"].append(timed(lambda: trained(inputs_embeds=states)[0].square().mean().backward()))
        for name, optimizer in optimizers.items():
            found[name].append(timed(optimizer.step))
    seconds = {name: median(values[1:]) for name, values in found.items()}
    whole = {name: seconds["gradients"] + seconds[name] for name in optimizers}
    return {**seconds, "ratio_of_training_steps": whole["spectral"] / whole["adamw"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--quick", action="store_true", help="one block, one rank, few tokens; decides nothing")
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--tokens", default="8x200", help="rows x length")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, length = (int(size) for size in ("1x16" if options.quick else options.tokens).split("x"))
    blocks = 1 if options.quick else options.blocks
    ranks = [4] if options.quick else [int(rank) for rank in options.ranks.split(",")]
    results = {str(r): measure(blocks, r, (rows, length), 1 if options.quick else options.repetitions) for r in ranks}
    document = {
        "settings": {"blocks": blocks, "tokens": [rows, length], "clock": "CPU seconds of one thread, median"},
        "ranks": results,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "optimizer.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for rank, row in results.items():
        print(f"r {rank}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
