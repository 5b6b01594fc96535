"""Laws of the cost of initialisation, fitted to what was measured, and what they say of larger models.

seconds = c₀ + c₁ · Σ t(m, n, r) / threads + c₂ · bytes          t = a · (m·n)^p, fitted for each rank
peak GiB = base + slope · entries of the largest matrix
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pissa.errors import MissingExtraError
from pissa.lab.comparison.statistics import t_quantile

from .scaling_shapes import MEASURED_THREADS, PREDICTED, Shape, largest

TRAINING_TOKENS = 100_000 * 200


def power_law(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """t = a · (m·n)^p by least squares of the logarithms, with the residuals of every row."""
    x = torch.tensor([math.log(row["m"] * row["n"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(row["seconds"]) for row in rows], dtype=torch.float64)
    p = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    log_a = float(y.mean() - p * x.mean())
    return {"a": math.exp(log_a), "p": p, "residuals": (y - log_a - p * x).exp().sub(1).tolist()}


def all_svds(shape: Shape, law: Mapping[str, Any]) -> float:
    """CPU seconds of all SVDs of a model."""
    return sum(law["a"] * (m * n) ** law["p"] for m, n in shape.matrices)


def terms(shape: Shape, size: float, threads: int, law: Mapping[str, Any]) -> list[float]:
    """What the coefficients multiply."""
    return [1.0, all_svds(shape, law) / threads, size / 1e9]


def fitted(rows: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> dict[str, Any]:
    """The three coefficients, the relative residual of every row, and the factor that a prediction may be off by."""
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise MissingExtraError("the fit needs scipy: pip install --group studies") from error
    A = torch.tensor([terms(Shape(*r["shape"]), r["bytes"], r["threads"], law) for r in rows], dtype=torch.float64)
    T = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    c, _ = nnls((A / T[:, None]).numpy(), torch.ones_like(T).numpy())
    ratios = (A @ torch.from_numpy(c)) / T
    freedom = max(1, len(rows) - int((c > 0).sum()))
    spread = math.sqrt(float(ratios.log().square().sum()) / freedom)
    factor = math.exp(min(50.0, t_quantile(0.05, freedom) * spread * math.sqrt(1 + 1 / len(rows))))
    return {"coefficients": c.tolist(), "residuals": (ratios - 1).tolist(), "factor": factor}


def predicted(name: str, rank: int, model: Mapping[str, Any], law: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of one model on two threads, in bf16."""
    shape = PREDICTED[name]
    parts = terms(shape, 2 * shape.parameters, MEASURED_THREADS, law)
    seconds = sum(c * part for c, part in zip(model["coefficients"], parts, strict=True))
    bounds = {"low": seconds / model["factor"], "high": seconds * model["factor"]}
    return {"name": name, "parameters": shape.parameters, "rank": rank, "seconds": seconds, **bounds}


def memory_law(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Peak GiB = base + slope · entries of the largest matrix, by least squares, with the residuals in GiB.

    A few of the largest matrices are in work at once, however many there are in all.
    """
    known = [row for row in rows if row["peak_gib"] is not None]
    x = torch.tensor([largest(Shape(*row["shape"])) for row in known], dtype=torch.float64)
    y = torch.tensor([row["peak_gib"] for row in known], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    base = float(y.mean() - slope * x.mean())
    return {"base": base, "slope": slope, "residuals": (base + slope * x - y).tolist()}


def training_seconds(shape: Shape, rate: float) -> float:
    """The paper's run, forward and backward through frozen weights (4 operations a weight and token), at that rate."""
    return 4 * shape.parameters * TRAINING_TOKENS / (rate * MEASURED_THREADS)
