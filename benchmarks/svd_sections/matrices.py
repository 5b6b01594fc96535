"""Sections "accuracy" and "matrices": time and loss of single decompositions."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pissa import truncated_svd

from .rivals import FAST, SLOW, energy_loss, rotated, settle


def measure_accuracy(models: dict[str, dict[str, Tensor]], rank: int, seeds: int) -> dict[str, Any]:
    """The default on every linear: the largest true and certified loss, and how far the two are apart."""
    losses, certified, optimism = [], [], []
    for weights in models.values():
        for W in weights.values():
            values = torch.linalg.svdvals(W.double())
            r = min(rank, min(W.shape))
            for seed in range(seeds):
                found = truncated_svd(W, r, seed=seed)
                losses.append(energy_loss(W, values, found[:3]))
                certified.append(found.certificate.captured_energy_loss)
                optimism.append(losses[-1] / certified[-1])
    count = len(losses)
    print(f"accuracy: {count} decompositions, largest loss {max(losses, default=0):.2e}")
    return {
        "decompositions": count,
        "largest_loss": max(losses, default=None),
        "largest_certified_loss": max(certified, default=None),
        "largest_ratio_true_to_certified": max(optimism, default=None),
    }


def measure_matrices(
    classes: dict[str, list[tuple[Tensor, Tensor]]],
    rank_of: Callable[[str], int],
    repeats: int,
    slow_repeats: int,
    only: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Alternating repetitions of every rival over all matrices of a class: median seconds, mean and largest loss."""
    rows = []
    for label, matrices in classes.items():
        rank = rank_of(label)
        rivals = {**FAST, **SLOW} if slow_repeats else FAST
        rivals = {name: rival for name, rival in rivals.items() if re.search(only, name)}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        losses: dict[str, list[float]] = {name: [] for name in rivals}
        for repeat in range(repeats):
            for name, rival in rotated(rivals, repeat):
                if name in SLOW and repeat >= slow_repeats:
                    continue
                settle()
                if name not in SLOW:
                    rival(matrices[0][0], rank, repeat)
                elapsed = 0.0
                for W, values in matrices:
                    start = clock()
                    found = rival(W, rank, repeat)
                    elapsed += clock() - start
                    losses[name].append(energy_loss(W, values, found))
                times[name].append(elapsed)
        for name in rivals:
            row = {
                "class": label,
                "rank": rank,
                "matrices": len(matrices),
                "rival": name,
                "median_seconds": statistics.median(times[name]),
                "load": os.getloadavg()[0],
                "seconds": times[name],
                "mean_loss": statistics.mean(losses[name]),
                "largest_loss": max(losses[name]),
            }
            rows.append(row)
            print(
                f"{label}: {name:24} {row['median_seconds']:8.3f} s  loss {row['largest_loss']:.1e}",
                flush=True,
            )
    return rows
