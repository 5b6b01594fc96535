"""Many epochs on few examples: does full fine-tuning overfit where adapters do not? (the paper's figures 4, 12, 13)

Held-out loss and accuracy are measured as training goes. Overfitting is how far the held-out loss ends above its lowest
point, in nats a token. The rate is the one at which that lowest point is lowest: PiSSA's for PiSSA and LoRA, as in the
paper's comparisons, and LoRA's for a second LoRA. The lowest point often comes early, so a rate that is best by it may
be one that overfits later.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pissa.adapted.adapt import adapt
from pissa.config import PissaConfig

from .figures import band, look_of, new_figure
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import TUNED, InMemory, LanguageTask, final_loss, find_rates, language_task
from .study import Outcome, Settings, Study

NAME = "long-run"
SEARCHED = ("full", "lora", "pissa")
METHODS = ("full", "lora", TUNED, "pissa")
RANK = 8


def run(settings: Settings) -> Outcome:
    """Every method for many epochs with every seed."""
    rows_used = settings.pick(quick=8, default=64, full=1000)
    epochs = settings.pick(quick=2, default=20, full=5)
    task = language_task(settings)
    steps = max(epochs * rows_used // task.batch, 2)
    task = replace(task, train=task.train[:rows_used], steps=steps)
    every = max(steps // 16, 1)
    memory = cache(lambda: InMemory(task))

    def measure(task: LanguageTask, /, method: str, rate: float, seed: int, solved: bool = False, **_: Any) -> Any:
        return _train(memory().on(task), method, seed, rate, every, solved)

    search = find_rates(settings, NAME, task, SEARCHED, measure, _lowest, rows=rows_used)
    rates = {**search.best, "lora": search.best["pissa"], TUNED: search.best["lora"]}
    keys = [
        {"method": m, "seed": seed, "rate": rates[m], "task": task.name, "rows": rows_used, "steps": steps}
        for m in METHODS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key, solved=True))
    parts = _parts(rows)
    results = {
        "task": task.name,
        "rows": rows_used,
        "epochs": epochs,
        "every": every,
        "search": search.as_dict(),
        "runs": rows,
        "overfitting": {m: mean_interval(by_seed(rows, _overfitting, method=m)).as_dict() for m in METHODS},
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}, {rows_used} rows, {epochs} epochs: " + ", ".join(
        f"{m} lowest held-out loss {statistics.fmean(by_seed(rows, _lowest, method=m)):.3f}, last "
        f"{statistics.fmean(by_seed(rows, _last, method=m)):.3f}, training loss "
        f"{statistics.fmean(by_seed(rows, 'final_loss', method=m)):.3f}, solves "
        f"{statistics.fmean(by_seed(rows, _solved, method=m)):.2f}"
        for m in METHODS
    )
    return Outcome(results, verdict_of(parts), f"{figures}; rates {search}")


def _lowest(row: Mapping[str, Any]) -> float:
    return min(row["held_out_losses"])


def _last(row: Mapping[str, Any]) -> float:
    return row["held_out_losses"][-1]


def _overfitting(row: Mapping[str, Any]) -> float:
    return _last(row) - _lowest(row)


def _solved(row: Mapping[str, Any]) -> float:
    return row["solved"][-1]


def _mean_loss(row: Mapping[str, Any]) -> float:
    return statistics.fmean(row["losses"])


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    def versus(value: Any, left: str, right: str) -> Interval:
        return advantage(rows, value, {"method": left}, {"method": right})

    return {
        "overfitting, full − PiSSA": versus(_overfitting, "full", "pissa"),
        "overfitting, full − LoRA": versus(_overfitting, "full", "lora"),
        "overfitting, full − LoRA at its own rate": versus(_overfitting, "full", TUNED),
        "share solved at the end, PiSSA − full": versus(_solved, "pissa", "full"),
        "share solved at the end, PiSSA − LoRA": versus(_solved, "pissa", "lora"),
        "share solved at the end, PiSSA − LoRA at its own rate": versus(_solved, "pissa", TUNED),
        "mean training loss, LoRA − PiSSA": versus(_mean_loss, "lora", "pissa"),
        "mean training loss, LoRA at its own rate − PiSSA": versus(_mean_loss, TUNED, "pissa"),
    }


def _train(memory: InMemory, method: str, seed: int, rate: float, every: int, solved: bool) -> dict[str, Any]:
    model = memory.copy()
    if method == "full":
        model.requires_grad_(True)
    else:
        kind = "pissa" if method == "pissa" else "lora-kaiming"
        model = adapt(model, PissaConfig(rank=RANK, method=kind, seed=seed))
    losses: list[float] = []
    shares: list[float] = []

    def look(step: int) -> None:
        if step % every == 0:
            losses.append(memory.loss(model))
            if solved:
                shares.append(memory.solved(model))

    look(0)
    found = memory.train(model, rate, seed, after_step=look)
    return {
        "losses": found.losses,
        "grad_norms": found.grad_norms,
        "held_out_losses": losses,
        "solved": shares,
        "final_loss": final_loss(found.losses),
    }


def draw(results: Mapping[str, Any]) -> Any:
    """Training loss, gradient norm, held-out loss and share solved by step."""
    figure, panels = new_figure(2, 2)
    titles = {
        "losses": "training loss",
        "grad_norms": "gradient norm",
        "held_out_losses": "held-out loss",
        "solved": "share of held-out problems solved",
    }
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        start, pace = (1, 1) if name in ("losses", "grad_norms") else (0, results["every"])
        for method in METHODS:
            curves = [row[name] for row in results["runs"] if row["method"] == method]
            x = [start + pace * place for place in range(len(curves[0]))]
            band(panel, x, curves, label=method, look=look_of(method))
        panel.set(title=title, xlabel="step", yscale="linear" if name == "solved" else "log")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{results['task']}: {results['rows']} rows, {results['epochs']} epochs", fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Over many epochs full fine-tuning overfits while PiSSA and LoRA do not, and PiSSA's loss falls faster than LoRA's "
    "(PiSSA, figures 4, 12, 13, appendix J)",
    run,
    draw,
    minutes=16,
    seed_count=5,
)
