"""Many epochs on few examples: does full fine-tuning overfit where adapters do not? (the paper's figures 4, 5, 12, 13)

Held-out loss is measured as training goes. Overfitting is how far it ends above its lowest point, in nats a token.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...config import PissaConfig
from ...live.apply import adapt
from ..figures import band, colour_of, new_figure
from ..interval import Interval, mean_interval
from .judge import advantage, by_seed, looked_at, sentence, verdict_of
from .lm import InMemory, final_loss, language_task
from .study import Outcome, Settings, Study

NAME = "long-run"
METHODS = ("full", "lora", "pissa")
RANK = 8


def run(settings: Settings) -> Outcome:
    """Every method for many epochs with every seed."""
    rows_used = settings.pick(quick=8, default=64, full=1000)
    task = language_task(settings)
    epochs = settings.pick(quick=2, default=20, full=5)
    steps = max(epochs * rows_used // task.batch, 2)
    task = replace(task, train=task.train[:rows_used], steps=steps)
    rates = settings.pick(
        quick=dict.fromkeys(METHODS, 1e-3),
        default={"full": 1e-3, "lora": 4e-3, "pissa": 4e-3},
        full={"full": 2e-5, "lora": 2e-4, "pissa": 2e-4},
    )
    every = max(steps // 16, 1)
    memory: list[InMemory] = []

    def measure(method: str, seed: int, rate: float, **_: Any) -> dict[str, Any]:
        if not memory:
            memory.append(InMemory(task))
        return _train(memory[0], method, seed, rate, every)

    keys = [
        {"method": m, "seed": seed, "rate": rates[m], "task": task.name, "rows": rows_used, "steps": steps}
        for m in METHODS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, measure)
    parts = _parts(rows)
    results = {
        "task": task.name,
        "rows": rows_used,
        "epochs": epochs,
        "every": every,
        "runs": rows,
        "overfitting": {m: mean_interval(by_seed(rows, _overfitting, method=m)).as_dict() for m in METHODS},
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}, {rows_used} rows, {epochs} epochs: " + ", ".join(
        f"{m} lowest held-out loss {statistics.fmean(by_seed(rows, _lowest, method=m)):.3f}, last "
        f"{statistics.fmean(by_seed(rows, _last, method=m)):.3f}, training loss "
        f"{statistics.fmean(by_seed(rows, 'final_loss', method=m)):.3f}"
        for m in METHODS
    )
    return Outcome(results, verdict_of(parts), f"{figures}; {sentence(parts)}{looked_at(settings)}")


def _lowest(row: Mapping[str, Any]) -> float:
    return min(row["held_out_losses"])


def _last(row: Mapping[str, Any]) -> float:
    return row["held_out_losses"][-1]


def _overfitting(row: Mapping[str, Any]) -> float:
    return _last(row) - _lowest(row)


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    def versus(value: Any, left: str, right: str) -> Interval:
        return advantage(rows, value, {"method": left}, {"method": right})

    return {
        "overfitting, full − PiSSA": versus(_overfitting, "full", "pissa"),
        "overfitting, full − LoRA": versus(_overfitting, "full", "lora"),
        "mean training loss, LoRA − PiSSA": versus(lambda row: statistics.fmean(row["losses"]), "lora", "pissa"),
    }


def _train(memory: InMemory, method: str, seed: int, rate: float, every: int) -> dict[str, Any]:
    model = memory.copy()
    if method == "full":
        model.requires_grad_(True)
    else:
        kind = "pissa" if method == "pissa" else "lora-kaiming"
        model = adapt(model, PissaConfig(rank=RANK, method=kind, seed=seed))
    seen = [memory.loss(model)]

    def look(step: int) -> None:
        if step % every == 0:
            seen.append(memory.loss(model))

    found = memory.train(model, rate, seed, after_step=look)
    return {
        "losses": found.losses,
        "grad_norms": found.grad_norms,
        "held_out_losses": seen,
        "final_loss": final_loss(found.losses),
    }


def draw(results: Mapping[str, Any]) -> Any:
    """Training loss, gradient norm and held-out loss by step."""
    figure, panels = new_figure(1, 3, width=4.4)
    for method in METHODS:
        rows = [row for row in results["runs"] if row["method"] == method]
        for panel, name in zip(panels, ("losses", "grad_norms", "held_out_losses"), strict=True):
            start, pace = (0, results["every"]) if name == "held_out_losses" else (1, 1)
            curves = [row[name] for row in rows]
            x = [start + pace * place for place in range(len(curves[0]))]
            band(panel, x, curves, label=method, colour=colour_of(method))
    for panel, title in zip(panels, ("training loss", "gradient norm", "held-out loss"), strict=True):
        panel.set(title=title, xlabel="step", yscale="log")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{results['task']}: {results['rows']} rows, {results['epochs']} epochs", fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Over many epochs full fine-tuning overfits while PiSSA and LoRA do not, and PiSSA's loss falls faster than LoRA's "
    "(PiSSA, figures 4, 5, 12, 13, appendix J)",
    run,
    draw,
    minutes=4,
)
