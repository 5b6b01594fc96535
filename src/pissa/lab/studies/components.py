"""Which singular triplets should the adapter start from?

The same construction on the r largest triplets (principal, which is PiSSA), the middle ones, the smallest ones, r drawn
at random, and the r with the largest first-order effect on the loss of the training data (scored). The paper compares
at one learning rate; factors of smaller triplets are smaller, and an adapter with smaller factors moves the weight
less at the same rate, so each component is also trained at a larger one and compared at its best.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...train.recipe import Recipe
from ..arithmetic import make_problems
from ..figures import COLOURS, band, new_figure
from ..interval import Interval, paired_difference
from .judge import advantage, by_seed, sentence, verdict_of
from .language import fine_tune, language_model
from .study import Outcome, Settings, Study, model_name

NAME = "components"
COMPONENTS = ("principal", "medium", "minor", "random", "scored")
CLAIMED = ("principal", "medium", "minor")
"""Those of figure 8; in the default pass the others are trained at one learning rate only."""
ATTENTION = r".*self_attn\..*_proj"
"""All that the default pass adapts: exact SVDs of the other layers would take longer than the training."""
PAPER_RATE = 2e-4
LAST_STEPS = 4
HELD_OUT = 16


def run(settings: Settings) -> Outcome:
    """Fine-tune from each component at each learning rate."""
    plan = settings.pick(
        quick={"rank": 4, "steps": 4, "batch": 2},
        default={"rank": 32, "steps": 8, "batch": 2},
        full={"rank": 128, "steps": 500, "batch": 128},
    )
    rates = settings.pick(quick=[PAPER_RATE], default=[PAPER_RATE, 2e-3], full=[2e-5, PAPER_RATE, 2e-3])
    targets = settings.pick(quick="all-linear", default=ATTENTION, full="all-linear")
    base = model_name(language_model(settings))
    keys = [
        {"base": base, "component": component, "targets": targets, "rate": rate, "seed": seed, **plan}
        for seed in settings.seeds
        for rate in rates
        for component in COMPONENTS
        if rate == PAPER_RATE or component in CLAIMED or settings.scale == "full"
    ]
    rows = settings.grid(NAME, keys, lambda base, **key: trained(settings, **key))
    parts = parts_of(rows)
    best = {component: best_rate(rows, component) for component in COMPONENTS}
    results = {"rows": rows, "best_rate": best, "parts": {name: part.as_dict() for name, part in parts.items()}}
    return Outcome(results, verdict_of(parts), figures_of(results, parts))


def recipe_for(component: str, targets: str, rank: int, steps: int, batch: int, rate: float, seed: int) -> Recipe:
    """The run's settings."""
    chosen: dict[str, Any] = {"component": component}
    if component == "random":
        chosen = {"method": "random-pissa"}
    elif component == "scored":
        chosen["scored_examples"] = min(16, steps * batch)
    return Recipe(
        **chosen,
        target_modules=targets,
        rank=rank,
        learning_rate=rate,
        max_steps=steps,
        batch_size=batch,
        micro_batch_size=min(batch, 4),
        dtype="fp32",
        seed=seed,
    )


def trained(
    settings: Settings, component: str, targets: str, rank: int, steps: int, batch: int, rate: float, seed: int
) -> dict[str, Any]:
    """One run: its losses and the held-out loss."""
    rows, held_out = make_problems(seed, steps * batch, settings.pick(quick=4, default=HELD_OUT, full=200))
    values = fine_tune(settings, recipe_for(component, targets, rank, steps, batch, rate, seed), rows, held_out)
    kept = {name: values[name] for name in ("losses", "grad_norms", "init_seconds", "held_out_loss")}
    return {**kept, "final_loss": statistics.fmean(values["losses"][-LAST_STEPS:])}


def best_rate(rows: Sequence[Mapping[str, Any]], component: str) -> float:
    """The learning rate of the lowest held-out loss."""
    rates = sorted({row["rate"] for row in rows if row["component"] == component})
    means = {rate: statistics.fmean(by_seed(rows, "held_out_loss", component=component, rate=rate)) for rate in rates}
    return min(means, key=means.__getitem__)


def parts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Each other component's loss less the principal one's: at one rate, and held-out at each one's best rate."""
    parts = {}
    best = best_rate(rows, "principal")
    for name, value in (("training", "final_loss"), ("held-out", "held_out_loss")):
        for component in ("medium", "minor"):
            left, right = ({"component": each, "rate": PAPER_RATE} for each in (component, "principal"))
            parts[f"{name} loss of {component} at {PAPER_RATE:g}"] = advantage(rows, value, left, right)
    for component in ("medium", "minor"):
        left = by_seed(rows, "held_out_loss", component=component, rate=best_rate(rows, component))
        right = by_seed(rows, "held_out_loss", component="principal", rate=best)
        parts[f"held-out loss of {component}, each at its best rate"] = paired_difference(left, right)
    return parts


def figures_of(results: Mapping[str, Any], parts: Mapping[str, Interval]) -> str:
    """Losses of every component at the paper's rate and at its best, then the differences."""
    lines = []
    for component, best in results["best_rate"].items():
        at = {
            rate: statistics.fmean(by_seed(results["rows"], "held_out_loss", component=component, rate=rate))
            for rate in (PAPER_RATE, best)
        }
        tail = f" ({at[best]:.3f} at {best:g})" if best != PAPER_RATE else ""
        lines.append(f"{component} {at[PAPER_RATE]:.3f}{tail}")
    return f"held-out loss at {PAPER_RATE:g}: {', '.join(lines)}. Above the principal one's: {sentence(parts)}"


def draw(results: Mapping[str, Any]) -> Any:
    """Training loss by step at the paper's rate, and the held-out loss against the rate."""
    figure, (curves, sweep) = new_figure(1, 2)
    rows = results["rows"]
    rates = sorted({row["rate"] for row in rows})
    for component, colour in zip(COMPONENTS, COLOURS, strict=False):
        own = [row["losses"] for row in rows if (row["component"], row["rate"]) == (component, PAPER_RATE)]
        band(curves, range(1, len(own[0]) + 1), own, label=component, colour=colour)
        found = {rate: by_seed(rows, "held_out_loss", component=component, rate=rate) for rate in rates}
        means = {rate: statistics.fmean(values) for rate, values in found.items() if values}
        sweep.plot(list(means), list(means.values()), color=colour, marker="o", label=component)
    curves.set(title=f"training loss at {PAPER_RATE:g}", xlabel="step")
    sweep.set(title="held-out loss", xlabel="learning rate", xscale="log")
    sweep.legend(frameon=False)
    return figure


STUDY = Study(
    NAME,
    "Adapters that start at the principal singular triplets reach a lower loss than those that start at the medium or "
    "the minor ones (PiSSA, appendix F, figure 8)",
    run,
    draw,
    minutes=8,
)
