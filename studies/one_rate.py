"""One learning rate for every start, rank, alpha and batch: the optimizer of products beside AdamW.

A cell is a task, a start, a rank, a scale and a batch. In every cell both optimizers are tried at rates that are powers
of two apart, all seeds at each, until worse rates enclose the best one. Then each optimizer is given ONE rate, the
median of its cells' best ones, and what that costs a cell is measured as a share of what it learns at all:

    lost = (L(one rate) − L(best rate)) / (L(untrained) − L(best rate))        L the held-out loss

The best rate of a cell is chosen on the same rows as it is reported on, for both optimizers alike: that favours each
cell's own rate, so what one rate loses is overstated. Beside the grid, variants of the optimizer and further starts are
tried at the middle rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch

from pissa import SpectralProduct
from pissa.errors import DataError
from pissa.optimizers.default_rates import SPECTRAL, default_rate
from pissa.training.rate_search import rate_beyond

from .figures import new_figure
from .fit import Diverged, fit
from .interval import Interval, mean_interval
from .judge import verdict_of
from .one_rate_tasks import TASKS, Task, adapted, find_task
from .study import Outcome, Settings, Study

NAME = "one-rate"
ADAMW = "adamw"
STARTS = ("lora", "pissa", "directions 0.25")
MIDDLE = 16
FIRST = {ADAMW: {"lora": 8e-3, "pissa": 4e-3}, SPECTRAL: {"lora": default_rate(SPECTRAL)}}
"""Optimizer -> start -> the middle of the three rates that a cell begins with; other starts begin as LoRA does."""
GROWTH = 8
"""Rates by which a cell's grid grows, at most."""
VARIANTS: dict[str, dict[str, Any]] = {
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0.7": {"momentum": 0.7},
    "momentum 0.8": {"momentum": 0.8},
    "momentum 0.95": {"momentum": 0.95},
    "damping 1e-2": {"damping": 1e-2},
    "damping 1e-6": {"damping": 1e-6},
    "root of out over in": {},
}
"""Variants of the optimizer: name -> its settings. The last measures a step from root mean square to root mean square,
that is, its spectral norm is √(out/in)·η."""
BEST_VARIANT = "momentum 0.8"
"""Tried on every task."""
FURTHER = ("directions 1", "directions 0.01", "directions 0.0001", "random 0.25", "random 0.0001")
"""Starts that are tried beside STARTS: how much of where one begins is direction, and how much is size."""
Losses = dict[float, list[float]]


@dataclass(frozen=True)
class Cell:
    """Where a rate is looked for."""

    task: str
    start: str
    rank: int
    scale: float
    batch: int

    def __str__(self) -> str:
        return f"{self.task}, {self.start}, r {self.rank}, alpha {self.scale:g}r, batch {self.batch}"


@dataclass(frozen=True)
class Curve:
    """One optimizer in one cell."""

    cell: Cell
    optimizer: str
    untrained: list[float]
    """Held-out loss before the first step, one a seed."""
    losses: Losses
    """Rate -> held-out loss, one a seed, infinite where the run diverged."""

    @property
    def best(self) -> float:
        """The rate of the lowest mean loss."""
        return min(self.losses, key=lambda rate: statistics.fmean(self.losses[rate]))

    def lost(self, rate: float) -> list[float]:
        """The share of what is learned at the best rate that is lost at another one, seed by seed, 1 at most."""
        triples = zip(self.losses[rate], self.losses[self.best], self.untrained, strict=True)
        return [min((loss - best) / max(start - best, 1e-9), 1.0) for loss, best, start in triples]

    def as_dict(self) -> dict[str, Any]:
        """What the study's results hold of it."""
        losses = {
            f"{rate:g}": [v if math.isfinite(v) else None for v in self.losses[rate]] for rate in sorted(self.losses)
        }
        return {
            **asdict(self.cell),
            "optimizer": self.optimizer,
            "best": self.best,
            "untrained": self.untrained,
            "losses": losses,
        }


def run(settings: Settings) -> Outcome:
    """Search every cell with both optimizers, then look at one rate for all."""
    tasks = cache(partial(find_task, settings))
    names = settings.pick(quick=("digits",), default=TASKS[:2], full=TASKS)
    found, left_out = [], []
    for name in names:
        try:
            task = tasks(name)
        except DataError as error:
            left_out.append(f"{name} ({error})")
            continue
        found += [searched(settings, task, cell, each) for cell in cells(settings, task) for each in (ADAMW, SPECTRAL)]
    one = {each: one_rate([curve for curve in found if curve.optimizer == each]) for each in (ADAMW, SPECTRAL)}
    found = [with_rate(settings, tasks(curve.cell.task), curve, one[curve.optimizer]) for curve in found]
    further = _further(settings, tasks, found)
    parts = parts_of(found, one)
    results = {
        "one_rate": one,
        "curves": [curve.as_dict() for curve in found],
        "variants": [curve.as_dict() for curve in further],
        "summary": {each: summary(found, each, one[each]) for each in (ADAMW, SPECTRAL)},
        "left_out": left_out,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    return Outcome(results, verdict_of(parts), _figures(results))


def cells(settings: Settings, task: Task) -> list[Cell]:
    """The cells of a task: starts by ranks, and at the middle rank twice the alpha and two other batches.

    A default pass takes two starts at the middle rank of every task but the first, whose runs are short.
    """
    small, middle, large = settings.pick(quick=(2, 4, 8), default=(4, MIDDLE, 64), full=(4, MIDDLE, 64))
    if settings.scale == "default" and task.name != TASKS[0]:
        return [Cell(task.name, start, middle, 1.0, task.batch) for start in STARTS[:2]]
    starts = settings.pick(quick=STARTS[:2], default=STARTS, full=STARTS)
    found = []
    for start in starts:
        found += [Cell(task.name, start, rank, 1.0, task.batch) for rank in (small, middle, large)]
        found += [Cell(task.name, start, middle, 2.0, task.batch)]
        found += [Cell(task.name, start, middle, 1.0, size) for size in (task.batch // 2, task.batch * 2)]
    return found


def searched(settings: Settings, task: Task, cell: Cell, optimizer: str, variant: str | None = None) -> Curve:
    """An optimizer in a cell, at rates a factor two apart until worse ones enclose the best."""
    middle = FIRST[optimizer].get(cell.start, FIRST[optimizer]["lora"])
    curve = Curve(cell, variant or optimizer, [], {})
    wanted = [middle / 2, middle, middle * 2]
    for _ in range(1 if settings.scale == "quick" else GROWTH + 1):
        for rate in wanted:
            curve = with_rate(settings, task, curve, rate)
        means = {rate: statistics.fmean(values) for rate, values in curve.losses.items()}
        further = rate_beyond(means, 2.0)
        if further is None:
            break
        wanted = [further]
    return curve


def with_rate(settings: Settings, task: Task, curve: Curve, rate: float) -> Curve:
    """The curve with one more rate, every seed of which is measured."""
    if rate in curve.losses:
        return curve
    keys = [
        {**asdict(curve.cell), "optimizer": curve.optimizer, "rate": rate, "seed": seed, "steps": task.steps}
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measured(task, **key))
    losses = [math.inf if row["held_out_loss"] is None else row["held_out_loss"] for row in rows]
    return Curve(curve.cell, curve.optimizer, [row["untrained"] for row in rows], {**curve.losses, rate: losses})


def measured(
    task: Task, /, start: str, rank: int, scale: float, batch: int, optimizer: str, rate: float, seed: int, **_: Any
) -> dict[str, Any]:
    """One run: its held-out loss, None where it diverged, and that before the first step."""
    model = adapted(task, start, rank, scale, seed)
    untrained = task.held_out(model, seed)
    try:
        fit(
            model.train(),
            task.batches(batch, seed),
            task.loss,
            learning_rate=rate,
            steps=task.steps,
            optimizer=maker(optimizer),
        )
        loss = task.held_out(model, seed)
    except Diverged:
        loss = math.inf
    return {"held_out_loss": loss if math.isfinite(loss) else None, "untrained": untrained}


def maker(name: str) -> Callable[[Any, float], torch.optim.Optimizer] | None:
    """What makes an optimizer or a variant, for `fit`; None for AdamW."""
    if name == ADAMW:
        return None

    def make(model: Any, rate: float) -> SpectralProduct:
        found = SpectralProduct(model, rate, **VARIANTS.get(name, {}))
        if name == "root of out over in":
            group = found.param_groups[0]
            for pair, A, B in zip(group["pairs"], group["params"][::2], group["params"][1::2], strict=True):
                pair["scale"] *= (A.shape[1] / B.shape[0]) ** 0.5
        return found

    return make


def _further(settings: Settings, tasks: Callable[[str], Task], found: Sequence[Curve]) -> list[Curve]:
    """Variants and further starts at the middle rank of the first task, and the best variant there at that of all."""
    names = list(dict.fromkeys(curve.cell.task for curve in found))
    if settings.scale == "quick" or not names:
        return []
    curves = []
    for task in map(tasks, names):
        usual = [Cell(task.name, start, MIDDLE, 1.0, task.batch) for start in STARTS[:2]]
        variants = VARIANTS if task.name == names[0] else (BEST_VARIANT,)
        curves += [searched(settings, task, cell, SPECTRAL, variant) for variant in variants for cell in usual]
    task = tasks(names[0])
    starts = [Cell(task.name, start, MIDDLE, 1.0, task.batch) for start in FURTHER]
    return curves + [searched(settings, task, cell, each) for cell in starts for each in (ADAMW, SPECTRAL)]


def one_rate(curves: Sequence[Curve]) -> float:
    """The median of the cells' best rates, of two in the middle the lower one."""
    return statistics.median_low(curve.best for curve in curves)


def summary(curves: Sequence[Curve], optimizer: str, rate: float) -> dict[str, Any]:
    """How far an optimizer's best rates are apart, and what one rate costs."""
    own = [curve for curve in curves if curve.optimizer == optimizer]
    best = [curve.best for curve in own]
    lost = {str(curve.cell): mean_interval(curve.lost(rate)) for curve in own}
    return {
        "cells": len(own),
        "best_rates": [min(best), max(best)],
        "within_a_factor_two": sum(rate / 2 <= each <= rate * 2 for each in best),
        "nothing_seen_lost": sum(not part.above_zero for part in lost.values()),
        "at_most_5_percent_lost": sum(part.mean <= 0.05 for part in lost.values()),
        "mean_lost": statistics.fmean(part.mean for part in lost.values()),
        "most_lost": max(part.mean for part in lost.values()),
    }


def parts_of(curves: Sequence[Curve], one: Mapping[str, float]) -> dict[str, Interval]:
    """What the claim says, by task, as differences that are positive where it holds: AdamW less the other."""
    parts: dict[str, Interval] = {}
    for task in dict.fromkeys(curve.cell.task for curve in curves):
        own = {each: [c for c in curves if (c.cell.task, c.optimizer) == (task, each)] for each in (ADAMW, SPECTRAL)}
        spread = {each: [_spread(own[each], seed) for seed in range(len(own[each][0].untrained))] for each in own}
        parts[f"{task}: doublings between the cells' best rates, AdamW − {SPECTRAL}"] = _difference(spread)
        lost = {each: _mean_by_seed([curve.lost(one[each]) for curve in own[each]]) for each in own}
        parts[f"{task}: share of what is learned that one rate loses, AdamW − {SPECTRAL}"] = _difference(lost)
        least = {each: _mean_by_seed([curve.losses[curve.best] for curve in own[each]]) for each in own}
        parts[f"{task}: held-out loss over cells, each at its own rate, AdamW − {SPECTRAL}"] = _difference(least)
    return parts


def _spread(curves: Sequence[Curve], seed: int) -> float:
    best = [min(curve.losses, key=lambda rate: curve.losses[rate][seed]) for curve in curves]
    return math.log2(max(best) / min(best))


def _mean_by_seed(values: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*values, strict=True)]


def _difference(values: Mapping[str, Sequence[float]]) -> Interval:
    return mean_interval([a - s for a, s in zip(values[ADAMW], values[SPECTRAL], strict=True)])


def _figures(results: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in results["summary"].items():
        low, high = entry["best_rates"]
        lines.append(
            f"{name}: best rates {low:g} to {high:g}, {entry['within_a_factor_two']} of {entry['cells']} within "
            f"a factor 2 of {results['one_rate'][name]:g}, which loses {entry['mean_lost']:.1%} of what is "
            f"learned (at most {entry['most_lost']:.1%}; no more than 5% in {entry['at_most_5_percent_lost']} cells)"
        )
    missing = f"; left out: {'; '.join(results['left_out'])}" if results["left_out"] else ""
    return "; ".join(lines) + missing


COLOURS = {"lora": "#4477aa", "pissa": "#cc3311"}
DASHES = {0: "-", 1: "--", 2: ":"}


def draw(results: Mapping[str, Any]) -> Any:
    """Loss against rate, a line a cell, as a share of what the cell learns; a row a task, a column an optimizer."""
    tasks = list(dict.fromkeys(curve["task"] for curve in results["curves"]))
    figure, panels = new_figure(len(tasks), 2, width=5.4, height=3.6)
    for line, task in enumerate(tasks):
        for column, optimizer in enumerate((ADAMW, SPECTRAL)):
            panel = panels[2 * line + column]
            own = [c for c in results["curves"] if (c["task"], c["optimizer"]) == (task, optimizer)]
            ranks = sorted({curve["rank"] for curve in own})
            for curve in own:
                _line(panel, curve, ranks.index(curve["rank"]))
            panel.axvline(results["one_rate"][optimizer], color="black", linewidth=0.8)
            rates = sorted({float(rate) for curve in own for rate in curve["losses"]})
            panel.set(xscale="log", ylim=(-0.03, 0.53), title=f"{task}, {optimizer}", xlabel="learning rate")
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
            panel.minorticks_off()
            panel.set_ylabel("share of what is learned that is lost")
    for start in dict.fromkeys(curve["start"] for curve in results["curves"]):
        panels[0].plot([], [], color=COLOURS.get(start, "#228833"), label=start)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("a line a cell (solid, dashed, dotted: rank from low to high); upright: the one rate", fontsize=10)
    return figure


def _line(panel: Any, curve: Mapping[str, Any], rank: int) -> None:
    means = {float(rate): statistics.fmean(v) for rate, v in curve["losses"].items() if None not in v}
    best, untrained = min(means.values()), statistics.fmean(curve["untrained"])
    shares = [min((loss - best) / max(untrained - best, 1e-9), 1.0) for loss in means.values()]
    colour = COLOURS.get(curve["start"], "#228833")
    panel.plot(list(means), shares, color=colour, linestyle=DASHES[rank], linewidth=1.1, alpha=0.8)


STUDY = Study(
    NAME,
    "Moved by steps of one spectral norm on their product, adapters have one learning rate that suits every start, "
    "rank, alpha and batch, where AdamW's best rate moves, and end at a lower loss (ours)",
    run,
    draw,
    minutes=20,
)
