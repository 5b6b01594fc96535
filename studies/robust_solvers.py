"""The entrywise l1 low-rank problem on real weights: is gradient descent on the Huber loss faster than sketching?

The report's Algorithm 1 starts from random factors and descends; its step size is left open, so it gets the best of
several learning rates for each matrix (only the best run's time is counted), once with torch's Huber threshold of 1 and
once with one tuned to the weights. The sketching algorithm (arXiv 1611.00898) runs as it stands. Ours is what
`--method robust-pissa` does. Seeds draw the random factors and the sketches; times are CPU seconds of one thread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pissa.colours import LIGHT
from pissa.decompose.robust import l1_approximation
from pissa.decompose.svd import truncated_svd
from pissa.lab.inspection.layers import kind_of

from .figures import new_figure
from .huber_descent import huber_descent
from .interval import Interval, mean_interval
from .judge import verdict_of
from .l1_sketch import cauchy_sketch
from .language import language_model
from .study import Outcome, Settings, Study, model_name
from .threads import one_thread
from .weights import loaded, spread

NAME = "robust-solvers"
DESCENT, TUNED, SKETCH, OURS = "Algorithm 1", "Algorithm 1, tuned threshold", "sketching", "ours"
SOLVERS = (DESCENT, TUNED, SKETCH, OURS)
KINDS = ("q_proj", "v_proj", "up_proj")
LEARNING_RATES = (0.03, 0.1, 0.3)
TUNED_DELTA = 0.1
"""Threshold of the tuned Huber loss, in units of the weight's mean magnitude."""
Factors = tuple[Tensor, Tensor]


def run(settings: Settings) -> Outcome:
    """Solve the problem for some matrices with every solver."""
    source = language_model(settings)
    ranks = settings.pick(quick=[4], default=[8, 64], full=[8, 16, 64])
    iterations = settings.pick(quick=20, default=400, full=1000)
    kinds = settings.pick(quick=KINDS, default=KINDS[:2], full=KINDS)
    layers = [name for name in spread(source, settings.pick(quick=1, default=4, full=4)) if kind_of(name) in kinds]
    keys = [
        {"source": model_name(source), "layer": layer, "rank": rank, "iterations": iterations, "seed": seed}
        for layer in layers or spread(source, 1)
        for rank in ranks
        for seed in settings.seeds
    ]
    rows = settings.grid(
        NAME, keys, lambda layer, rank, iterations, seed, **_: solve(source, layer, rank, iterations, seed)
    )
    results = summarised(rows)
    parts = parts_of(results["matrices"])
    results["parts"] = {name: part.as_dict() for name, part in parts.items()}
    return Outcome(results, verdict_of(parts), figures_of(results))


def summarised(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows, their means for each matrix and rank, and every solver in units of sketching."""
    matrices = [means_of(rows, layer, rank) for layer, rank in dict.fromkeys((r["layer"], r["rank"]) for r in rows)]
    error, speed = (
        {s: mean_interval(ratios(matrices, s, name)).as_dict() for s in SOLVERS if s != SKETCH}
        for name in ("error", "seconds")
    )
    return {"rows": rows, "matrices": matrices, "error_of_sketching": error, "seconds_of_sketching": speed}


def solve(source: str, layer: str, rank: int, iterations: int, seed: int) -> dict[str, Any]:
    """Mean absolute error, relative to the truncated SVD's, and CPU seconds of every solver on one matrix."""
    W, _ = loaded(source)[layer]
    delta = TUNED_DELTA * float(W.abs().mean())
    found = {
        DESCENT: best_of(W, [descent(W, rank, iterations, rate, 1.0, seed) for rate in LEARNING_RATES]),
        TUNED: best_of(W, [descent(W, rank, iterations, rate, delta, seed) for rate in LEARNING_RATES]),
        SKETCH: best_of(W, [lambda: cauchy_sketch(W, rank, seed=seed)]),
        OURS: best_of(W, [lambda: ours(W, rank, seed)]),
    }
    U, S, Vh, _ = truncated_svd(W, rank, algorithm="exact")
    svd = float((W - (U * S) @ Vh).abs().mean())
    return {
        "shape": list(W.shape),
        "svd_mean_absolute_error": svd,
        **{solver: {"error": error / svd, "seconds": seconds} for solver, (error, seconds) in found.items()},
    }


def descent(W: Tensor, rank: int, iterations: int, rate: float, delta: float, seed: int) -> Callable[[], Factors]:
    """Algorithm 1, to be run."""
    return lambda: huber_descent(W, rank, iterations=iterations, learning_rate=rate, delta=delta, seed=seed)


def ours(W: Tensor, rank: int, seed: int) -> Factors:
    """A (r, n) and B (m, r) of `l1_approximation`."""
    U, S, Vh, _ = l1_approximation(W, rank, seed=seed)
    return Vh, U * S


def best_of(W: Tensor, runs: Sequence[Callable[[], Factors]]) -> tuple[float, float]:
    """Mean absolute error and CPU seconds of the run with the smallest error."""
    found = []
    for run in runs:
        with one_thread():
            start = time.thread_time()
            A, B = run()
            seconds = time.thread_time() - start
        found.append((float((W - B @ A).abs().mean()), seconds))
    return min(found)


def means_of(rows: Sequence[Mapping[str, Any]], layer: str, rank: int) -> dict[str, Any]:
    """One matrix over its seeds, which are no independent matrices."""
    found = [row for row in rows if (row["layer"], row["rank"]) == (layer, rank)]
    means = {
        solver: {name: statistics.fmean(row[solver][name] for row in found) for name in ("error", "seconds")}
        for solver in SOLVERS
    }
    return {"layer": layer, "rank": rank, **means}


def ratios(matrices: Sequence[Mapping[str, Any]], solver: str, name: str) -> list[float]:
    """A solver's error or time in units of sketching's, one a matrix."""
    return [each[solver][name] / each[SKETCH][name] for each in matrices]


def parts_of(matrices: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """The claim is of Algorithm 1: a lower error, and in less time; each as a difference that should be positive."""
    return {
        f"log10 of {name}, sketching − {DESCENT}": mean_interval(
            [-math.log10(r) for r in ratios(matrices, DESCENT, key)]
        )
        for name, key in (("error", "error"), ("CPU time", "seconds"))
    }


def figures_of(results: Mapping[str, Any]) -> str:
    """Ratios to the sketching algorithm."""
    lines = [
        f"{solver}: error {results['error_of_sketching'][solver]['mean']:.2f} of sketching's, "
        f"CPU time {results['seconds_of_sketching'][solver]['mean']:.0f} times sketching's"
        for solver in (DESCENT, TUNED, OURS)
    ]
    share = statistics.fmean(each[OURS]["seconds"] / each[DESCENT]["seconds"] for each in results["matrices"])
    return f"{'; '.join(lines)}; ours takes {share:.2f} of {DESCENT}'s time"


def draw(results: Mapping[str, Any]) -> Any:
    """Error against time, one point a matrix; the lower left is best."""
    ranks = sorted({each["rank"] for each in results["matrices"]})
    figure, panels = new_figure(1, len(ranks))
    for rank, panel in zip(ranks, panels, strict=True):
        for number, solver in enumerate(SOLVERS):
            rows = [row[solver] for row in results["rows"] if row["rank"] == rank]
            dots = {"s": 26, "alpha": 0.8, "color": LIGHT[number], "label": solver, "marker": "ovsD"[number]}
            panel.scatter([row["seconds"] for row in rows], [row["error"] for row in rows], **dots)
        panel.axhline(1, color="#888888", linewidth=0.8)
        panel.set(title=f"rank {rank}", xlabel="CPU seconds", ylabel="mean absolute error / truncated SVD's")
        panel.set(xscale="log", ylim=(0, None))
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


STUDY = Study(
    NAME,
    "Gradient descent on the Huber loss (Algorithm 1) finds a rank-r matrix of smaller mean absolute error than the "
    "sketching algorithm, in less time (report, figure 3)",
    run,
    draw,
    minutes=4,
    intervals_over="matrices",
)
