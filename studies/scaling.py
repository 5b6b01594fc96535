"""How long does initialisation take, and how much memory, from 100M to 70B parameters?

    seconds = c₀ + c₁ · Σ t(m, n, r) / threads + c₂ · bytes          t = a · (m·n)^p, fitted for each rank

t is measured here on single matrices up to the shapes of a 70B model; the c's are fitted, as relative errors and none
negative, to whole initialisations: those below, measured on two idle cores (benchmarks/results/init.json), and small
ones measured here (CPU seconds, as if of one thread). Beyond what was measured the model is extrapolated, with an
interval from its residuals. The claim is of a GPU; here it is a processor, so both readings of it are tested: seconds
at 7B, and a negligible share of the paper's own training run (100k examples of 200 tokens) on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pissa.colours import LIGHT

from .figures import new_figure
from .interval import Interval
from .judge import verdict_of
from .language import RUNS
from .scaling_costs import init_seconds, matmul_rate, svd_seconds
from .scaling_laws import fitted, memory_law, power_law, predicted, training_seconds
from .scaling_shapes import MEASURED_THREADS, PREDICTED, RANK, SMALL, Shape, largest, published
from .study import Outcome, Settings, Study

NAME = "scaling"
PAPER_RANK = 128
PAPER_SECONDS = 22.7
"""The paper's slowest fast SVD of LLaMA-2-7B at rank 128 (table 6)."""
NEGLIGIBLE = 0.01
SQUARES = [(side, side) for side in (512, 1024, 2048, 4096)]


def run(settings: Settings) -> Outcome:
    """Measure matrices and small models, fit, extrapolate."""
    shapes = settings.pick(
        quick=[(128, 128), (256, 128), (256, 256)],
        default=[*SQUARES, (11008, 4096), (8192, 8192)],
        full=[*SQUARES, (11008, 4096), (8192, 8192), (28672, 8192)],
    )
    ranks = settings.pick(quick=[RANK, 64], default=[RANK, PAPER_RANK], full=[RANK, PAPER_RANK])
    keys = [
        {"m": m, "n": n, "rank": rank, "seed": seed} for m, n in shapes for rank in ranks for seed in settings.seeds
    ]
    matrices = settings.grid(f"{NAME}-matrices", keys, svd_seconds)
    names = settings.pick(quick=["tiny"], default=list(SMALL)[:3], full=list(SMALL))
    scratch = settings.out / RUNS
    whole = settings.grid(NAME, [{"name": name} for name in names], lambda name: init_seconds(name, scratch))
    laws = {rank: power_law([row for row in matrices if row["rank"] == rank]) for rank in ranks}
    rows = [*whole, *published()]
    model = fitted(rows, laws[RANK])
    predictions = [predicted(name, rank, model, laws[rank]) for name in PREDICTED for rank in ranks]
    rate = matmul_rate(settings.pick(quick=256, default=2048, full=4096))
    memory = memory_law(rows)
    for each in predictions:
        each["peak_gib"] = memory["base"] + memory["slope"] * largest(PREDICTED[each["name"]])
        each["training_share"] = each["seconds"] / training_seconds(PREDICTED[each["name"]], rate)
    fits = {
        "laws": {str(rank): law for rank, law in laws.items()},
        "model": model,
        "memory": memory,
        "flops_per_thread": rate,
    }
    parts = parts_of(predictions, max(ranks))
    listed = {name: part.as_dict() for name, part in parts.items()}
    results = {"matrices": matrices, "inits": rows, **fits, "predictions": predictions, "parts": listed}
    return Outcome(results, verdict_of(parts), figures_of(results, max(ranks)))


def parts_of(predictions: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Interval]:
    """Seconds at 7B, as many as the paper's at most; and negligible beside training at every size."""
    found = [each for each in predictions if each["rank"] == rank]
    at_7b = next(each for each in found if each["name"] == "7B")
    most = max(found, key=lambda each: each["training_share"] * each["high"] / each["seconds"])
    return {
        f"seconds at 7B, the paper's {PAPER_SECONDS} less ours": below(PAPER_SECONDS, at_7b, at_7b["seconds"]),
        f"share of the training run, {NEGLIGIBLE} less ours": below(NEGLIGIBLE, most, most["training_share"]),
    }


def below(limit: float, prediction: Mapping[str, Any], value: float) -> Interval:
    """How far a multiple of a prediction's seconds lies below a limit."""
    low, mean, high = (limit - value * prediction[name] / prediction["seconds"] for name in ("high", "seconds", "low"))
    return Interval(mean, low, high, (mean,))


def figures_of(results: Mapping[str, Any], rank: int) -> str:
    """Predictions at the paper's rank, and how well the model fits."""
    found = [each for each in results["predictions"] if each["rank"] == rank]
    times = ", ".join(f"{e['name']} {e['seconds']:.0f} s ({e['low']:.0f} to {e['high']:.0f})" for e in found)
    share = max(each["training_share"] for each in found)
    off = max(abs(value) for value in results["model"]["residuals"])
    return (
        f"Rank {rank}, {MEASURED_THREADS} processor cores: {times}; at most {share:.1e} of the paper's training run "
        f"on the same cores; the model is off by up to {off:.0%} where it was measured, up to 8B; peak memory "
        f"{max(row['peak_gib'] or 0 for row in results['inits']):.1f} GiB at most there, {found[-1]['peak_gib']:.1f} "
        f"GiB at {found[-1]['name']} (off by up to {max(map(abs, results['memory']['residuals'])):.1f})"
    )


def draw(results: Mapping[str, Any]) -> Any:
    """Single SVDs with their power laws, whole initialisations with the extrapolation, and the residuals."""
    figure, (single, whole, left) = new_figure(1, 3)
    for number, (rank, law) in enumerate(results["laws"].items()):
        rows = [row for row in results["matrices"] if row["rank"] == int(rank)]
        sizes = sorted({row["m"] * row["n"] for row in rows})
        single.scatter([r["m"] * r["n"] for r in rows], [r["seconds"] for r in rows], s=14, color=LIGHT[number])
        text = f"rank {rank}: (m·n)^{law['p']:.2f}"
        single.plot(sizes, [law["a"] * size ** law["p"] for size in sizes], color=LIGHT[number], label=text)
        found = [each for each in results["predictions"] if each["rank"] == int(rank)]
        x = [each["parameters"] for each in found]
        whole.plot(x, [e["seconds"] for e in found], color=LIGHT[number], label=f"model, rank {rank}", marker=".")
        bounds = [e["low"] for e in found], [e["high"] for e in found]
        whole.fill_between(x, *bounds, color=LIGHT[number], alpha=0.15, lw=0)
    for where, marker in (("here, CPU seconds", "s"), ("two idle cores, wall clock", "o")):
        rows = [row for row in results["inits"] if row["where"] == where]
        sizes = [Shape(*row["shape"]).parameters for row in rows]
        label = f"measured ({where}), rank {RANK}"
        whole.scatter(
            sizes, [row["seconds"] for row in rows], marker=marker, color=LIGHT[5], s=28, label=label, zorder=3
        )
    names = [row["name"] for row in results["inits"]]
    left.barh(names, [100 * value for value in results["model"]["residuals"]], color=LIGHT[1])
    left.set(title="model against measurement", xlabel="residual, %")
    single.set(title="one truncated SVD", xlabel="m·n", ylabel="CPU seconds", xscale="log", yscale="log")
    whole.set(
        title="whole initialisation, two cores", xlabel="parameters", ylabel="seconds", xscale="log", yscale="log"
    )
    for panel in (single, whole):
        panel.legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    NAME,
    "PiSSA is initialised in seconds, a negligible cost, at every size from 184M to 70B (PiSSA, abstract and table 6)",
    run,
    draw,
    minutes=6,
    intervals_over="the fit's residuals",
)
