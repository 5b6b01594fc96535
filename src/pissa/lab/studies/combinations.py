"""PiSSA's initialisation under DoRA and AdaLoRA: does each of the three gain from it, as in the paper's table 5?

Every method is trained at every rate of a grid. The paper compares at one rate; that is shown, and so is each method at
its own best rate, which is the fairer question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import colour_of, new_figure
from ..interval import Interval, mean_interval
from .judge import advantage, by_seed, looked_at, sentence, verdict_of
from .lm import best_rates, cell, language_task, mean_curve, recipe
from .study import Outcome, Settings, Study

NAME = "combinations"
PAIRS = {"lora": "pissa", "dora": "pissa+dora", "adalora": "pissa+adalora"}
METHODS = tuple(method for pair in PAIRS.items() for method in pair)
NAMES = {"lora": "vanilla", "dora": "DoRA", "adalora": "AdaLoRA"}


def run(settings: Settings) -> Outcome:
    """Every method at every rate with every seed."""
    task = language_task(settings, steps=30)
    rates = settings.pick(quick=(1e-3,), default=(2e-3, 8e-3), full=(2e-5, 2e-4, 1e-3, 2e-3))
    pairs = PAIRS if settings.scale != "quick" else {"lora": "pissa"}
    methods = [method for pair in pairs.items() for method in pair]
    keys = [
        {"method": method, "rate": rate, "seed": seed, "task": task.name, "steps": task.steps}
        for method in methods
        for rate in rates
        for seed in settings.seeds
    ]
    rows = settings.grid(
        NAME, keys, lambda method, rate, seed, **_: cell(settings, task, recipe(task, method, rate, seed))
    )
    best = best_rates(rows)
    same, tuned = _gains(rows, pairs, dict.fromkeys(METHODS, rates[0])), _gains(rows, pairs, best)
    parts = {
        **{f"gain from PiSSA at rate {rates[0]:g}, {name}": gain for name, gain in same.items()},
        **{f"each at its best rate, {name}": gain for name, gain in tuned.items()},
    }
    table = {m: mean_interval(by_seed(rows, "held_out_loss", method=m, rate=best[m])).as_dict() for m in methods}
    results = {
        "task": task.name,
        "runs": rows,
        "best_rates": best,
        "held_out_loss_at_best_rate": table,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}; held-out loss at the best rate: " + ", ".join(
        f"{m} {table[m]['mean']:.3f} ({best[m]:g})" for m in methods
    )
    return Outcome(results, verdict_of(parts), f"{figures}; {sentence(parts)}{looked_at(settings)}")


def _gains(
    rows: Sequence[Mapping[str, Any]], pairs: Mapping[str, str], rates: Mapping[str, float]
) -> dict[str, Interval]:
    """By how much each method's held-out loss falls when it starts from PiSSA."""
    return {
        NAMES[without]: advantage(
            rows,
            "held_out_loss",
            {"method": without, "rate": rates[without]},
            {"method": with_pissa, "rate": rates[with_pissa]},
        )
        for without, with_pissa in pairs.items()
    }


def draw(results: Mapping[str, Any]) -> Any:
    """Held-out loss against the learning rate, and training loss at each method's best one."""
    figure, panels = new_figure(1, 2, width=5.6)
    rows = results["runs"]
    rates = sorted({row["rate"] for row in rows})
    for method in results["best_rates"]:
        style = {"color": colour_of(method), "linestyle": "-" if method in PAIRS.values() else "--"}
        losses = [by_seed(rows, "held_out_loss", method=method, rate=rate) for rate in rates]
        panels[0].plot(rates, [sum(v) / len(v) for v in losses], marker="o", markersize=3, label=method, **style)
        chosen = [row for row in rows if row["method"] == method and row["rate"] == results["best_rates"][method]]
        curve = mean_curve(chosen, "losses")
        panels[1].plot(range(1, len(curve) + 1), curve, **style)
    panels[0].set(title=results["task"], xlabel="learning rate", ylabel="held-out loss", xscale="log", yscale="log")
    panels[1].set(title="each at its best rate", xlabel="step", ylabel="training loss", yscale="log")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    NAME,
    "LoRA, DoRA and AdaLoRA each get better when they start from PiSSA (PiSSA, appendix A, table 5)",
    run,
    draw,
    minutes=5,
)
