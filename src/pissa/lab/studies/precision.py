"""Full fine-tuning in bf16 and in fp32: how much does precision change, and is either better? (the paper's table 7)

In bf16 the weights that are trained stay in fp32 and matrix products are in bf16 (autocast). With `--full` LoRA and
PiSSA are trained beside it, with a frozen base in either precision. The rates and the number of steps were chosen after
a look at one seed on the same held-out problems.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ..figures import colour_of, new_figure
from ..interval import mean_interval, paired_difference
from .judge import by_seed, looked_at
from .lm import cell, language_task, recipe
from .study import Outcome, Settings, Study, Verdict

NAME = "precision"
METHODS = ("full", "lora", "pissa")
DTYPES = ("fp32", "bf16")
MEASURES = ("final_loss", "held_out_loss")
SIDES = (-0.2, 0.2)
"""Where a figure has the two precisions, from their method's place."""


def run(settings: Settings) -> Outcome:
    """Every method in both precisions with every seed."""
    task = language_task(settings, steps=40)
    methods = settings.pick(quick=METHODS[:1], default=METHODS[:1], full=METHODS)
    rate = settings.pick(
        quick=dict.fromkeys(METHODS, 1e-3),
        default={"full": 1e-3, "lora": 8e-3, "pissa": 4e-3},
        full={"full": 2e-5, "lora": 2e-3, "pissa": 2e-4},
    )
    keys = [
        {"method": method, "dtype": dtype, "seed": seed, "rate": rate[method], "task": task.name, "steps": task.steps}
        for method in methods
        for dtype in DTYPES
        for seed in settings.seeds
    ]
    rows = settings.grid(
        NAME,
        keys,
        lambda method, dtype, seed, rate, **_: cell(settings, task, recipe(task, method, rate, seed, dtype=dtype)),
    )
    summary = {method: {name: _compared(rows, method, name) for name in MEASURES} for method in methods}
    full = summary["full"]["held_out_loss"]
    results = {"task": task.name, "runs": rows, "summary": summary}
    figures = f"{task.name}; held-out loss in fp32 and what bf16 adds: " + ", ".join(
        f"{method} {part['held_out_loss']['fp32']:.4f} {part['held_out_loss']['text']}"
        for method, part in summary.items()
    )
    figures += (
        f"; in full fine-tuning precision moves it by {full['mean_move']:.2g}, the seed by {full['seed_spread']:.2g} "
        f"(standard deviation){looked_at(settings)}"
    )
    return Outcome(results, verdict(full), figures)


def _compared(rows: Any, method: str, measure: str) -> dict[str, Any]:
    """bf16 − fp32 with its interval, how far it moves a run, and how far the seed does."""
    fp32, bf16 = (by_seed(rows, measure, method=method, dtype=dtype) for dtype in DTYPES)
    difference = paired_difference(bf16, fp32)
    return {
        "fp32": statistics.fmean(fp32),
        "bf16": statistics.fmean(bf16),
        "difference": difference.as_dict(),
        "text": f"{difference}",
        "one_sided": difference.above_zero or difference.below_zero,
        "mean_move": statistics.fmean(abs(a - b) for a, b in zip(bf16, fp32, strict=True)),
        "seed_spread": statistics.stdev(fp32) if len(fp32) > 1 else 0.0,
        "interval": mean_interval(fp32).as_dict(),
    }


def verdict(full: Mapping[str, Any]) -> Verdict:
    """Precision must move a result at least as far as the seed does, and then not always to the same side."""
    if full["mean_move"] < full["seed_spread"]:
        return "does not hold here"
    return "holds in part" if full["one_sided"] else "holds"


def draw(results: Mapping[str, Any]) -> Any:
    """Both losses in both precisions, a line for each seed."""
    figure, panels = new_figure(1, 2)
    for panel, measure, title in zip(panels, MEASURES, ("final training loss", "held-out loss"), strict=True):
        methods = list(results["summary"])
        for place, method in enumerate(methods):
            for row in results["runs"]:
                if row["method"] != method or row["dtype"] != "fp32":
                    continue
                other = next(
                    r for r in results["runs"] if (r["method"], r["dtype"], r["seed"]) == (method, "bf16", row["seed"])
                )
                panel.plot(
                    [place + side for side in SIDES],
                    [row[measure], other[measure]],
                    marker="o",
                    color=colour_of(method),
                )
        ends = {
            f"{m}\n{d}": place + side for place, m in enumerate(methods) for d, side in zip(DTYPES, SIDES, strict=True)
        }
        panel.set_xticks(list(ends.values()), list(ends))
        panel.margins(x=0.4)
        panel.set(title=title, ylabel="nats a token")
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Precision changes the result of full fine-tuning greatly, and neither bf16 nor fp32 is the better one throughout "
    "(PiSSA, appendix D, table 7)",
    run,
    draw,
    minutes=3,
)
