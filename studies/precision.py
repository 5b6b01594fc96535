"""Full fine-tuning in bf16 and in fp32: how much does precision change, and is either better? (the paper's table 7)

    fp32       weights, gradients and AdamW's moments in fp32
    autocast   the same, matrix products in bf16
    bf16       weights, gradients and moments in bf16, as the paper trains in full

A step that is less than half the distance between neighbouring bf16 numbers is lost, so the smaller the learning rate
the more bf16 loses: each is trained at the rate that suits fp32, and at a quarter and a sixteenth of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from pissa.colours import LIGHT

from .figures import new_figure
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import InMemory, LanguageTask, final_loss, find_rates, language_task
from .study import Outcome, Settings, Study

NAME = "precision"
DTYPES = ("fp32", "autocast", "bf16")
MEASURES = {"final_loss": "final training loss", "held_out_loss": "held-out loss", "solved": "share solved"}
SHARES = (1, 4, 16)
"""Parts of the learning rate."""


def run(settings: Settings) -> Outcome:
    """Every precision at every rate with every seed."""
    task = language_task(settings)
    shares = settings.pick(quick=SHARES[:2], default=SHARES, full=SHARES)
    memory = cache(lambda: InMemory(task))

    def measure(
        task: LanguageTask, /, rate: float, seed: int, dtype: str = "fp32", solved: bool = False, **_: Any
    ) -> dict[str, Any]:
        return _train(memory().on(task), dtype, rate, seed, solved)

    search = find_rates(settings, NAME, task, ("full",), measure)
    best = search.best["full"]
    keys = [
        {"dtype": dtype, "rate": best / share, "share": share, "seed": seed, "task": task.name, "steps": task.steps}
        for dtype in DTYPES
        for share in shares
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key, solved=True))
    differences = {dtype: {share: _difference(rows, dtype, share) for share in shares} for dtype in DTYPES[1:]}
    parts = _parts(rows, {share: best / share for share in shares})
    results = {
        "task": task.name,
        "rate": best,
        "search": search.as_dict(),
        "runs": rows,
        "above_fp32": {dtype: {str(s): d.as_dict() for s, d in own.items()} for dtype, own in differences.items()},
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}; held-out loss in fp32, and what it is above that: " + "; ".join(
        f"at {best / share:.2g} {statistics.fmean(by_seed(rows, 'held_out_loss', dtype='fp32', share=share)):.4f}, "
        + ", ".join(f"{dtype} {own[share]}" for dtype, own in differences.items())
        for share in shares
    )
    return Outcome(results, verdict_of(parts), figures)


def _train(memory: InMemory, dtype: str, rate: float, seed: int, solved: bool) -> dict[str, Any]:
    model = memory.copy().requires_grad_(True)
    if dtype == "bf16":
        model.to(torch.bfloat16)
    # its cache would hand every step the first step's weights
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "autocast", cache_enabled=False):
        found = memory.train(model, rate, seed)
    return {
        "losses": found.losses,
        "grad_norms": found.grad_norms,
        "final_loss": final_loss(found.losses),
        "held_out_loss": memory.loss(model.float()),
        **({"solved": memory.solved(model)} if solved else {}),
    }


def _difference(rows: Sequence[Mapping[str, Any]], dtype: str, share: int) -> Interval:
    """Held-out loss above fp32's."""
    found = ({"dtype": which, "share": share} for which in (dtype, "fp32"))
    return advantage(rows, "held_out_loss", *found)


def _parts(rows: Sequence[Mapping[str, Any]], rates: Mapping[int, float]) -> dict[str, Interval]:
    """What table 7 shows: bf16 moves a run further than the seed does, and each precision is somewhere the better."""
    parts = {}
    above = {share: _difference(rows, "bf16", share).values for share in rates}
    for share, rate in rates.items():
        fp32 = by_seed(rows, "held_out_loss", dtype="fp32", share=share)
        deviation = statistics.stdev(fp32) if len(fp32) > 1 else 0.0
        far = mean_interval([abs(value) - deviation for value in above[share]])
        parts[f"move by bf16 at rate {rate:.2g}, less the seeds' deviation"] = far
    least, most = (pick(rates, key=lambda share: statistics.fmean(above[share])) for pick in (min, max))
    parts[f"fp32 better than bf16 where it is most, at rate {rates[most]:.2g}"] = mean_interval(above[most])
    parts[f"bf16 better than fp32 where it is most, at rate {rates[least]:.2g}"] = mean_interval(
        [-value for value in above[least]]
    )
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """Losses and accuracy in every precision against the learning rate, a line for each seed."""
    figure, panels = new_figure(1, 3, width=4.4)
    for panel, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for dtype, colour in zip(DTYPES, LIGHT, strict=False):
            own = [row for row in results["runs"] if row["dtype"] == dtype]
            rates = sorted({row["rate"] for row in own})
            for seed in sorted({row["seed"] for row in own}):
                values = [row[measure] for rate in rates for row in own if (row["rate"], row["seed"]) == (rate, seed)]
                panel.plot(rates, values, color=colour, marker="o", markersize=3, linewidth=0.6)
            means = [statistics.fmean(row[measure] for row in own if row["rate"] == rate) for rate in rates]
            panel.plot(rates, means, color=colour, label=dtype)
        panel.set(title=title, xlabel="learning rate", xscale="log", yscale="linear" if measure == "solved" else "log")
    panels[0].legend(frameon=False)
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Precision changes the result of full fine-tuning greatly, and neither bf16 nor fp32 is the better one throughout "
    "(PiSSA, appendix D, table 7)",
    run,
    draw,
    minutes=12,
    seed_count=5,
)
