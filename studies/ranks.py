"""Loss, gradient norm and accuracy against rank: PiSSA, LoRA and full fine-tuning, and the three with a 4-bit base.

The paper's figures 7, 15, 16 and 17 hold one learning rate for all ranks and methods. So does this study, at the one
that suits PiSSA of rank 8; beside it LoRA runs at the one that suits LoRA of rank 8. Reduction ratios against rank are
the quantisation study's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .figures import look_of, new_figure
from .interval import Interval, mean_interval, paired_difference
from .judge import advantage, by_seed, verdict_of
from .lm import TUNED, LanguageTask, cell, find_rates, language_task, recipe
from .study import Outcome, Settings, Study

NAME = "ranks"
PLAIN = ("lora", "pissa", TUNED)
QUANTIZED = ("qlora", "loftq", "qpissa")
SEARCHED_AT = 8
MEASURES = {
    "final_loss": "final training loss",
    "held_out_loss": "held-out loss",
    "first_grad_norm": "gradient norm of the first step",
    "solved": "share of problems solved",
}


def run(settings: Settings) -> Outcome:
    """Find the rates, then train every method at every rank with every seed."""
    task = language_task(settings)
    ranks = settings.pick(quick=(1, 4), default=(1, 2, 4, 8, 16, 32, 64), full=(1, 2, 4, 8, 16, 32, 64, 128))
    quantized = settings.pick(quick=(4,), default=(1, 8, 64), full=ranks)

    def measure(
        task: LanguageTask,
        /,
        method: str,
        rate: float,
        seed: int,
        rank: int = SEARCHED_AT,
        solved: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        ranked = {} if method == "full" else {"rank": rank}
        values = cell(settings, task, recipe(task, method, rate, seed, **ranked), solved=solved)
        return {**values, "first_grad_norm": values["grad_norms"][0]}

    search = find_rates(settings, NAME, task, ("lora", "pissa", "full"), measure)
    rate_of = dict.fromkeys((*PLAIN, *QUANTIZED), search.best["pissa"])
    rate_of |= {TUNED: search.best["lora"], "full": search.best["full"]}
    ranks_of = {**dict.fromkeys(PLAIN, ranks), **dict.fromkeys(QUANTIZED, quantized), "full": (0,)}
    keys = [
        {"method": m, "rank": rank, "rate": rate_of[m], "seed": seed, "task": task.name, "steps": task.steps}
        for m, own in ranks_of.items()
        for rank in own
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key, solved=True))
    parts = _parts(rows, ranks, quantized)
    table = {
        name: {m: {str(rank): _mean(rows, name, m, rank) for rank in own} for m, own in ranks_of.items()}
        for name in MEASURES
    }
    results = {
        "task": task.name,
        "rate": search.best["pissa"],
        "search": search.as_dict(),
        "runs": [{name: value for name, value in row.items() if name != "grad_norms"} for row in rows],
        "table": table,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    ends = ", ".join(
        f"{method} {entries[min(entries, key=int)]['mean']:.3f} to {entries[max(entries, key=int)]['mean']:.3f}"
        for method, entries in table["held_out_loss"].items()
        if method != "full"
    )
    figures = (
        f"{task.name}, rate {search.best['pissa']:.2g}; held-out loss from the lowest rank to the highest: {ends}; "
        f"full {table['held_out_loss']['full']['0']['mean']:.3f}; rates {search}"
    )
    return Outcome(results, verdict_of(parts), figures)


def _mean(rows: Sequence[Mapping[str, Any]], name: str, method: str, rank: int) -> dict[str, Any]:
    return mean_interval(by_seed(rows, name, method=method, rank=rank)).as_dict()


def _parts(rows: Sequence[Mapping[str, Any]], ranks: Sequence[int], quantized: Sequence[int]) -> dict[str, Interval]:
    """What the figures show, as differences that are positive where they do here."""

    def gain(value: str | Callable[[Mapping[str, Any]], float], left: str, right: str, **where: Any) -> Interval:
        return advantage(rows, value, {"method": left, **where}, {"method": right, **where})

    parts: dict[str, Interval] = {}
    for value, words in (("final_loss", "training loss"), ("held_out_loss", "held-out loss")):
        lowest, highest = (by_seed(rows, value, method="pissa", rank=rank) for rank in (ranks[0], ranks[-1]))
        parts |= {f"{words}, LoRA − PiSSA, r {rank}": gain(value, "lora", "pissa", rank=rank) for rank in ranks}
        parts[f"{words} over ranks, LoRA at its own rate − PiSSA"] = gain(value, TUNED, "pissa")
        parts[f"{words} of PiSSA, r {ranks[0]} − r {ranks[-1]}"] = paired_difference(lowest, highest)
        for other in ("qlora", "loftq"):
            parts[f"{words}, {other} − qpissa"] = gain(value, other, "qpissa", rank=list(quantized))
    parts["share solved over ranks, PiSSA − LoRA"] = gain("solved", "pissa", "lora")
    parts["share solved over ranks, PiSSA − LoRA at its own rate"] = gain("solved", "pissa", TUNED)
    parts["log10 of the first gradient norm, PiSSA − LoRA"] = gain(
        lambda row: math.log10(row["first_grad_norm"]), "pissa", "lora"
    )
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """Final training loss, held-out loss, first gradient norm and share solved against rank."""
    figure, panels = new_figure(2, 2, width=5.4)
    for panel, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for method, entries in results["table"][name].items():
            if method == "full":
                continue
            ranks = [int(rank) for rank in entries]
            means = [entry["mean"] for entry in entries.values()]
            spread = [
                [mean - min(entry["values"]) for mean, entry in zip(means, entries.values(), strict=True)],
                [max(entry["values"]) - mean for mean, entry in zip(means, entries.values(), strict=True)],
            ]
            style = {"linestyle": "--" if method in QUANTIZED else ":" if method == TUNED else "-"}
            colour = look_of("lora" if method == TUNED else method).colour
            panel.errorbar(ranks, means, spread, label=method, color=colour, capsize=2, marker="o", ms=3, **style)
        full = results["table"][name]["full"]["0"]["mean"]
        panel.axhline(full, color=look_of("full").colour, linewidth=1, label="full")
        panel.set(title=title, xlabel="rank", yscale="linear" if name == "solved" else "log")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks_shown(results), list(map(str, ranks_shown(results))))
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{results['task']}, learning rate {results['rate']:.2g}", fontsize=10)
    return figure


def ranks_shown(results: Mapping[str, Any]) -> list[int]:
    """The ranks on the axis."""
    return [int(rank) for rank in results["table"]["final_loss"]["pissa"]]


STUDY = Study(
    NAME,
    "At every rank PiSSA has a lower training loss and a larger gradient than LoRA, QPiSSA a lower loss than QLoRA and "
    "LoftQ, and loss falls with rank (PiSSA, figures 7, 15, 16, 17)",
    run,
    draw,
    minutes=29,
)
