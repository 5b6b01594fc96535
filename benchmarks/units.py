"""What bf16 units bring to a decomposition: the same SVDs with first products in fp32 and in bf16, against rivals.

    python benchmarks/units.py [--size 4096] [--rank 128] [--smollm DIR] [--repeats 5] [--threads 1]

    rates      the machine's own products, size² times size × k, in fp32 and bf16
    matrix     one matrix with the spectrum of weights, exact in bf16: pissa both ways and `svd_lowrank(niter=16)`
    model      `adapt` of SmolLM2 at r = 64 both ways, PEFT's `pissa_niter_16`, and PEFT without a decomposition

All take turns in one process, in a rotating order. Writes `benchmarks/results/units.json` with whether the processor
has the units, so that a run on one that emulates them is not mistaken for a result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from svd import environment, save
from svd_sections.model import SMOLLM_LINEARS
from svd_sections.rivals import energy_loss, rotated, torch_lowrank
from torch import Tensor

from pissa import PissaConfig, adapt, truncated_svd
from pissa.decompose.units import VARIABLE, has_bf16_units

WIDTHS = (32, 136, 256)
PRODUCTS = ("fp32", "bf16")


@contextmanager
def first_products(name: str) -> Iterator[None]:
    """The precision of first products inside, whatever the processor has."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in a rotating order, after one run of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in rotated(runs, repeat):
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def measure_rates(size: int, repeats: int) -> list[dict[str, Any]]:
    """Products of a square matrix with a thin one."""
    rows = []
    for width in WIDTHS:
        A, X = torch.randn(size, size), torch.randn(size, width)
        low, thin = A.bfloat16(), X.bfloat16()
        seconds = turns({"fp32": lambda A=A, X=X: A @ X, "bf16": lambda A=low, X=thin: A @ X}, repeats)
        rows += [
            {"width": width, "products": name, "seconds": each, "gflops": 2e-9 * size**2 * width / each}
            for name, each in seconds.items()
        ]
        print(rows[-2], rows[-1], flush=True)
    return rows


def weight_like(size: int) -> Tensor:
    """(size, size) with a slowly decaying spectrum, exact in bf16."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    spectrum = (torch.arange(1, size + 1) + size / 64) ** -0.6
    return ((left * spectrum) @ right).bfloat16().float()


def measure_matrix(size: int, rank: int, repeats: int) -> dict[str, Any]:
    """Seconds and true losses for one matrix."""
    W, found = weight_like(size), {}
    values = torch.linalg.svdvals(W.double())

    def ours(name: str) -> None:
        with first_products(name):
            found[f"pissa {name}"] = truncated_svd(W, rank, algorithm="krylov")[:3]

    def lowrank() -> None:
        found["svd_lowrank niter 16"] = torch_lowrank(16)(W, rank, 0)

    runs: dict[str, Callable[[], Any]] = {f"pissa {name}": lambda name=name: ours(name) for name in PRODUCTS}
    seconds = turns(runs | {"svd_lowrank niter 16": lowrank}, repeats)
    rows = {name: {"seconds": each, "loss": energy_loss(W, values, found[name])} for name, each in seconds.items()}
    print(json.dumps(rows), flush=True)
    return {"size": size, "rank": rank, "rivals": rows}


def measure_model(directory: Path, rank: int, repeats: int) -> dict[str, float]:
    """Seconds of whole initialisations of SmolLM2, loading not counted."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def with_pissa(model: Any, name: str) -> None:
        with first_products(name):
            adapt(model, PissaConfig(rank=rank, target_modules=SMOLLM_LINEARS))

    def with_peft(model: Any, init: Any) -> None:
        names: list[str] = [*SMOLLM_LINEARS]
        get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=init))

    runs: dict[str, Callable[[Any], None]] = {
        "pissa fp32": lambda model: with_pissa(model, "fp32"),
        "pissa bf16": lambda model: with_pissa(model, "bf16"),
        "PEFT pissa_niter_16": lambda model: with_peft(model, "pissa_niter_16"),
        "PEFT, no decomposition": lambda model: with_peft(model, True),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in rotated(runs, repeat):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            start = time.perf_counter()
            run(model)
            if repeat:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(json.dumps(medians), flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description="First products in bf16 against fp32, and against rivals.")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--smollm", type=Path, default=Path(__file__).resolve().parents[1] / ".cache/SmolLM2-135M-Instruct"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"benchmark": "units", "has_bf16_units": has_bf16_units()}
    report["environment"] = environment(options.threads)
    report["rates"] = measure_rates(options.size, options.repeats)
    report["matrix"] = measure_matrix(options.size, options.rank, options.repeats)
    if options.smollm.is_dir():
        report["model"] = measure_model(options.smollm, 64, options.repeats)
    report["environment"]["load_at_end"] = os.getloadavg()
    save(report, options.out / "units.json")


if __name__ == "__main__":
    main()
