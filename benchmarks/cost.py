"""Refit the cost model of `decompose/cost.py` to the machine at hand, and time how good its choices are.

    python benchmarks/cost.py [--quick] [--repeats 5] [--tolerance 1e-3]

Each algorithm decomposes matrices of many sizes at many ranks, turn by turn, one thread, CPU seconds, medians. The
coefficients of each are then fitted by non-negative least squares to relative errors, and printed as the tuples that
`cost.py` holds. `benchmarks/results/cost.json` gets them with every time, the residuals, and for each size how much
slower than the fastest the choice is, as the model stands ("slower_now") and with the fit ("slower_fitted").
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from pissa import truncated_svd
from pissa.decompose import cost

SIZES = ((576, 192), (384, 384), (576, 576), (1536, 576), (768, 768), (2048, 1024), (4096, 1024), (2048, 2048))
RANKS = (8, 16, 32, 64, 128)
Terms = Callable[[int, int, int, float], tuple[float, ...]]
TERMS: dict[str, Terms] = {
    "gram": lambda m, n, rank, tolerance: cost.gram_terms(m, n, rank),
    "chebyshev": lambda m, n, rank, tolerance: cost.chebyshev_terms(m, n, cost.filter_width(rank)),
    "krylov": lambda m, n, rank, tolerance: cost.krylov_terms(m, n, rank, cost.krylov_columns(rank, tolerance)),
}


def weight_like(m: int, n: int) -> Tensor:
    """(m, n) with the slowly decaying spectrum of trained weights."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, n, generator=generator))[0] for k in (m, n))
    return (left * (torch.arange(1, n + 1) + n / 16) ** -0.6) @ right.mT


def measure(sizes: tuple[tuple[int, int], ...], repeats: int, tolerance: float) -> list[dict[str, Any]]:
    """Median milliseconds of each algorithm for each size and rank."""
    rows = []
    for m, n in sizes:
        W = weight_like(m, n)
        for rank in (r for r in RANKS if 3 * r < n):
            times: dict[str, list[float]] = {name: [] for name in TERMS}
            for seed in range(repeats):
                for name in times:
                    start = time.thread_time()
                    truncated_svd(W, rank, algorithm=name, seed=seed, tolerance=tolerance)
                    times[name].append(1e3 * (time.thread_time() - start))
            row = {"m": m, "n": n, "rank": rank} | {name: statistics.median(each) for name, each in times.items()}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def fit(rows: list[dict[str, Any]], name: str, tolerance: float) -> tuple[list[float], float]:
    """Coefficients, and the root mean square of the relative errors that they leave."""
    A = np.array([TERMS[name](row["m"], row["n"], row["rank"], tolerance) for row in rows])
    y = np.array([row[name] for row in rows])
    coefficients, residual = nnls(A / y[:, None], np.ones(len(y)))
    return coefficients.tolist(), float(residual / len(y) ** 0.5)


def slower(rows: list[dict[str, Any]], chosen: Callable[[dict[str, Any]], str]) -> list[float]:
    """How many times as long as the fastest the chosen algorithm takes."""
    return [row[chosen(row)] / min(row[name] for name in TERMS) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Refit the cost model of the truncated SVD.")
    parser.add_argument("--quick", action="store_true", help="three small sizes, two repetitions: a check that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    rows = measure(SIZES[:3] if options.quick else SIZES, 2 if options.quick else options.repeats, options.tolerance)
    fitted = {name: fit(rows, name, options.tolerance) for name in TERMS}

    def predicted(row: dict[str, Any]) -> str:
        times = {
            name: cost.weighed(tuple(fitted[name][0]), terms(row["m"], row["n"], row["rank"], options.tolerance))
            for name, terms in TERMS.items()
        }
        return min(times, key=times.__getitem__)

    now = slower(rows, lambda row: cost.choose(row["m"], row["n"], row["rank"], options.tolerance))
    after = slower(rows, predicted)
    for name, (coefficients, residual) in fitted.items():
        values = ", ".join(f"{c:.4g}" for c in coefficients)
        print(f"{name.upper()}: Terms = ({values})  # relative error {residual:.2f}")
    print(f"choice against the fastest: at most {max(now):.2f} times now, {max(after):.2f} times with the fit")
    document = {
        "benchmark": "cost",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "load_at_start": load,
        "load_at_end": os.getloadavg(),
        "tolerance": options.tolerance,
        "coefficients": {name: coefficients for name, (coefficients, _) in fitted.items()},
        "relative_error": {name: residual for name, (_, residual) in fitted.items()},
        "slower_now": now,
        "slower_fitted": after,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cost.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
