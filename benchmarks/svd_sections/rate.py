"""Section "rate": how near to the machine's own rate a decomposition comes, and where its time goes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from pissa import truncated_svd
from pissa.decompose.krylov import block_width


def measure_rate(label: str, W: Tensor, rank: int, repeats: int) -> dict[str, Any]:
    """Share of the machine's rate for `W·X` and `Wᵀ·Y` (same shapes, same run) that a whole decomposition reaches."""
    from torch.profiler import ProfilerActivity, profile

    W = W if W.shape[0] >= W.shape[1] else W.T
    m, n = W.shape
    b = block_width(rank)
    X, Y = torch.randn(n, b), torch.randn(m, b)
    product_times, totals, passes = [], [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(W, X)
        torch.mm(W.T, Y)
        product_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        passes = truncated_svd(W, rank, algorithm="krylov").certificate.passes
        totals.append(time.perf_counter() - start)
    machine = 4 * m * n * b / statistics.median(product_times)
    reached = 2 * m * n * b * passes / statistics.median(totals)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        truncated_svd(W, rank, algorithm="krylov")
    spent = {
        "products with W": 0.0,
        "orthogonalisation": 0.0,
        "small eigenproblems": 0.0,
        "copies": 0.0,
        "other": 0.0,
    }
    for event in recorded.key_averages(group_by_input_shape=True):
        spent[kind_of(event.key, event.input_shapes, (m, n))] += event.self_cpu_time_total
    whole = sum(spent.values())
    share = {name: value / whole for name, value in spent.items()}
    print(
        f"rate {label}: {reached / 1e9:.0f} of {machine / 1e9:.0f} GFLOP/s = {reached / machine:.0%};",
        end=" ",
    )
    print(", ".join(f"{name} {value:.0%}" for name, value in share.items()), flush=True)
    return {
        "matrix": label,
        "block": b,
        "passes": passes,
        "machine_gflops": machine / 1e9,
        "reached_gflops": reached / 1e9,
        "share_of_machine_rate": reached / machine,
        "where_the_time_goes": share,
    }


def kind_of(operation: str, shapes: list[Any], weight: tuple[int, int]) -> str:
    """Which part of the method an operator of the profile belongs to."""
    if operation == "aten::mm" and shapes and tuple(shapes[0]) in (weight, weight[::-1]):
        return "products with W"
    if "eigh" in operation or "qr" in operation:
        return "small eigenproblems"
    if operation in (
        "aten::mm",
        "aten::addmm_",
        "aten::linalg_cholesky_ex",
        "aten::linalg_solve_triangular",
        "aten::triu",
    ):
        return "orthogonalisation"
    if operation in ("aten::copy_", "aten::fill_"):
        return "copies"
    return "other"
