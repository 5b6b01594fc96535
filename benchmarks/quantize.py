"""How much of NF4's error each method takes away, and how long QPiSSA-5 takes against exact SVDs.

    python benchmarks/quantize.py reduction MODEL_DIR --rank 12 --only encoder
    python benchmarks/quantize.py speed MODEL_DIR --rank 32

MODEL_DIR holds safetensors files. `reduction` splits every linear layer by every method, with and without double
quantisation, and reports the paper's reduction ratio in the nuclear norm. `speed` runs QPiSSA-5 over all of them
and, turn by turn on one matrix of each shape, the same alternation with exact SVDs from LAPACK, scaled up by the
number of matrices of that shape. Times are CPU seconds of one thread, so that other work on the machine hardly
counts. Each writes `benchmarks/results/quantize-COMMAND.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pissa import PissaConfig, reduction_ratio, split_weight
from pissa.config import quantization_preset
from pissa.quantize.alternate import alternate
from pissa.quantize.error import matrix_norm, split_error
from pissa.quantize.nf4 import quantize_nf4

METHODS = ("qlora", "loftq-1", "qpissa-1", "loftq-5", "qpissa-5", "ours-5", "ours-10")
RESULTS = Path(__file__).parent / "results"
REPEATS = 3


def linear_weights(directory: Path, only: str) -> dict[str, Tensor]:
    """Name -> (out, in) of every layer's matrices, fp32; embeddings, heads and norms are left out."""
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                if (
                    ".layer" in name
                    and only in name
                    and name.endswith(".weight")
                    and len(file.get_slice(name).get_shape()) == 2
                ):
                    weights[name.removesuffix(".weight")] = file.get_tensor(name).float()
    if not weights:
        raise SystemExit(f"no linear layers in {directory}; give a model directory with safetensors files")
    return weights


def reduction(weights: dict[str, Tensor], rank: int) -> list[dict[str, Any]]:
    rows = []
    for double_quant in (False, True):
        for name in METHODS:
            method = "lora-kaiming" if name == "qlora" else "pissa"
            config = PissaConfig(rank, method=method, quantization=quantization_preset(name, double_quant=double_quant))
            by_kind, against_single, seconds = defaultdict(list), [], 0.0
            for weight, W in weights.items():
                start = time.process_time()
                split = split_weight(W, config, name=weight)
                seconds += time.process_time() - start
                by_kind[weight.rpartition(".")[2]].append(reduction_ratio(W, split))
                single = matrix_norm(W - quantize_nf4(W).dequantize(), "nuclear")
                against_single.append(100 * (1 - matrix_norm(split_error(W, split), "nuclear") / single))
            every = [value for values in by_kind.values() for value in values]
            rows.append(
                {
                    "method": name,
                    "double_quant": double_quant,
                    "rank": rank,
                    "norm": "nuclear",
                    "mean": mean(every),
                    "mean_against_single": mean(against_single),
                    "by_kind": {kind: mean(values) for kind, values in by_kind.items()},
                    "seconds": seconds,
                }
            )
            print(f"{name:9} double_quant={double_quant!s:5} {rows[-1]['mean']:6.2f} % {seconds:7.1f} s", flush=True)
    return rows


def exact_qpissa(W: Tensor, rank: int, iterations: int) -> Tensor:
    """QPiSSA-T as published, by LAPACK's SVD; returns its error."""
    E, error = W, W
    for _ in range(iterations):
        U, S, Vh = torch.linalg.svd(E, full_matrices=False)
        residual = torch.addmm(W, U[:, :rank] * S[:rank], Vh[:rank], alpha=-1)
        Q = quantize_nf4(residual).dequantize()
        E, error = W - Q, residual - Q
    return error


def speed(weights: dict[str, Tensor], rank: int, iterations: int = 5) -> list[dict[str, Any]]:
    config = quantization_preset(f"qpissa-{iterations}", double_quant=False)
    shapes = defaultdict(list)
    for W in weights.values():
        shapes[tuple(W.shape)].append(W)
    rows = []
    for shape, matrices in shapes.items():
        ours, exact, ratios = [], [], []
        for W in matrices[:REPEATS]:
            start = time.process_time()
            found = alternate(W, rank, config, dtype=torch.float32)
            middle = time.process_time()
            reference = exact_qpissa(W, rank, iterations)
            exact.append(time.process_time() - middle)
            ours.append(middle - start)
            ratios.append(found.errors[-1] / matrix_norm(reference, "frobenius"))
        start = time.process_time()
        for W in matrices:
            alternate(W, rank, config, dtype=torch.float32)
        row = {
            "shape": list(shape),
            "matrices": len(matrices),
            "seconds_all": time.process_time() - start,
            "median_ours": median(ours),
            "median_exact": median(exact),
            "seconds_exact_scaled": median(exact) * len(matrices),
            "error_ratio": max(ratios),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    whole, scaled = sum(row["seconds_all"] for row in rows), sum(row["seconds_exact_scaled"] for row in rows)
    print(f"all {len(weights)} matrices: {whole:.1f} s, exact {scaled:.1f} s, {scaled / whole:.1f} times as long")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the figures that are not nested."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("reduction", "speed"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--only", default="", help="take matrices whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = linear_weights(options.model, options.only)
    load = os.getloadavg()[0]
    rows = (reduction if options.command == "reduction" else speed)(weights, options.rank)
    document = {
        "benchmark": f"quantize {options.command}",
        "model": options.model.resolve().name,
        "rank": options.rank,
        "matrices": len(weights),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": 1,
        "load_before": load,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quantize-{options.command}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"quantize-{options.command}.md").write_text(table(rows))


if __name__ == "__main__":
    main()
