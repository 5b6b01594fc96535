"""Loss and gradient norm against rank: PiSSA, LoRA and full fine-tuning, and the three with a 4-bit base.

The paper's figures 7, 15, 16 and 17 hold one learning rate fixed for all ranks and methods; so does this study, at the
rate of two where LoRA and PiSSA of rank 8 together do best (`trials`). Reduction ratios against rank are the
quantisation study's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import colour_of, new_figure
from ..interval import Interval, mean_interval, paired_difference
from .judge import advantage, by_seed, looked_at, sentence, verdict_of
from .lm import LanguageTask, best_rates, cell, language_task, recipe
from .study import Outcome, Settings, Study

NAME = "ranks"
PLAIN = ("lora", "pissa")
QUANTIZED = ("qlora", "loftq", "qpissa")
TRIED_AT = 8


def run(settings: Settings) -> Outcome:
    """Choose a rate, then train every method at every rank with every seed."""
    task = language_task(settings, steps=30)
    ranks = settings.pick(quick=(1, 4), default=(1, 8, 64), full=(1, 2, 4, 8, 16, 32, 64, 128))
    quantized = settings.pick(quick=(4,), default=(8,), full=ranks)
    tried = settings.pick(quick=(1e-3,), default=(2e-3, 4e-3), full=(1e-4, 2e-4, 1e-3))

    def measure(method: str, rank: int, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        return cell(settings, task, _recipe(task, method, rank, rate, seed))

    def keys(methods: Sequence[str], ranks: Sequence[int], rates: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"method": m, "rank": r, "rate": rate, "seed": seed, "task": task.name, "steps": task.steps}
            for m in methods
            for r in ranks
            for rate in rates
            for seed in settings.seeds
        ]

    trials = settings.grid(NAME, keys(PLAIN, (TRIED_AT,), tried), measure) if len(tried) > 1 else []
    rate = best_rates([{**row, "method": "both"} for row in trials])["both"] if trials else tried[0]
    rows = settings.grid(
        NAME, keys(PLAIN, ranks, [rate]) + keys(QUANTIZED, quantized, [rate]), measure
    ) + settings.grid(NAME, keys(("full",), (0,), [rate / 4]), measure)
    parts = _parts(rows, ranks, quantized)
    results = {
        "task": task.name,
        "rate": rate,
        "trials": trials,
        "runs": rows,
        "held_out_loss": _table(rows),
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    listed = "; ".join(
        f"{method} " + ", ".join(f"r {rank}: {entry['mean']:.3f}" for rank, entry in entries.items())
        for method, entries in results["held_out_loss"].items()
        if method != "full"
    )
    full = results["held_out_loss"]["full"]["0"]["mean"]
    figures = (
        f"{task.name}, rate {rate:g}; held-out loss: {listed}; full {full:.3f}; {sentence(parts)}{looked_at(settings)}"
    )
    return Outcome(results, verdict_of(parts), figures)


def _recipe(task: LanguageTask, method: str, rank: int, rate: float, seed: int) -> Any:
    if method == "full":
        return recipe(task, method, rate, seed)
    published = {"quantize_method": "qpissa-5"} if method == "qpissa" else {}
    if method == "qpissa":
        return recipe(task, "pissa", rate, seed, rank=rank, quantize="nf4", **published)
    return recipe(task, method, rate, seed, rank=rank)


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for method in (*PLAIN, *QUANTIZED, "full"):
        for rank in sorted({row["rank"] for row in rows if row["method"] == method}):
            values = by_seed(rows, "held_out_loss", method=method, rank=rank)
            found.setdefault(method, {})[str(rank)] = mean_interval(values).as_dict()
    return found


def _parts(rows: Sequence[Mapping[str, Any]], ranks: Sequence[int], quantized: Sequence[int]) -> dict[str, Interval]:
    """What the figures show, as differences that are positive where they do here."""

    def gain(value: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Interval:
        return advantage(rows, value, left, right)

    lowest, highest = (
        by_seed(rows, "final_loss", method="pissa", rank=ranks[0]),
        by_seed(rows, "final_loss", method="pissa", rank=ranks[-1]),
    )
    parts = {
        f"training loss, LoRA − PiSSA, r {rank}": gain(
            "final_loss", {"method": "lora", "rank": rank}, {"method": "pissa", "rank": rank}
        )
        for rank in ranks
    }
    parts[f"PiSSA r {ranks[0]} − r {ranks[-1]}"] = paired_difference(lowest, highest)
    for other in QUANTIZED[:2]:
        where = {"rank": list(quantized)}
        parts[f"{other} − qpissa"] = gain("final_loss", {"method": other, **where}, {"method": "qpissa", **where})
    parts["first gradient norm, PiSSA − LoRA"] = advantage(
        rows, lambda row: row["grad_norms"][0], {"method": "pissa"}, {"method": "lora"}
    )
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """Held-out loss, final training loss and first gradient norm against rank."""
    figure, panels = new_figure(1, 3, width=4.4)
    values = {
        "held-out loss": lambda row: row["held_out_loss"],
        "final training loss": lambda row: row["final_loss"],
        "gradient norm of the first step": lambda row: row["grad_norms"][0],
    }
    rows = results["runs"]
    for panel, (title, value) in zip(panels, values.items(), strict=True):
        for method in (*PLAIN, *QUANTIZED):
            ranks = sorted({row["rank"] for row in rows if row["method"] == method})
            found = [by_seed(rows, value, method=method, rank=rank) for rank in ranks]
            means = [sum(column) / len(column) for column in found]
            spread = [
                [mean - min(column) for mean, column in zip(means, found, strict=True)],
                [max(column) - mean for mean, column in zip(means, found, strict=True)],
            ]
            line = "--" if method in QUANTIZED else "-"
            panel.errorbar(ranks, means, spread, label=method, color=colour_of(method), linestyle=line, capsize=2)
        full = by_seed(rows, value, method="full")
        panel.axhline(sum(full) / len(full), color=colour_of("full"), linewidth=1, label="full")
        panel.set(title=title, xlabel="rank", xscale="log", yscale="log")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{results['task']}, learning rate {results['rate']:g}", fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "At every rank PiSSA has a lower training loss and a larger gradient than LoRA, QPiSSA a lower loss than QLoRA and "
    "LoftQ, and loss falls with rank (PiSSA, figures 7, 15, 16, 17)",
    run,
    draw,
    minutes=6,
)
