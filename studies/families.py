"""(Q)PiSSA against (Q)LoRA in one family of models after the other: the paper's figure 6 in small.

By default a small model of each family is pretrained on generated word problems (`small_lm.py`) and adapted to kinds of
problems new to it. Real models are compared one at a time: `python -m studies families --model ID` for any that is at
hand, the paper's nine in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .figures import look_of, new_figure
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import TUNED, LanguageTask, cell, find_rates, language_task, recipe, small_task
from .search import Search
from .small_lm import FAMILIES, small_lm
from .study import Outcome, Settings, Study, model_name

NAME = "families"
STEPS = 40
PLAIN = ("lora", "pissa", TUNED)
QUANTIZED = ("qlora", "qpissa")
EXPERTS = ("mixtral", "qwen2_moe")
"""Families whose experts bitsandbytes cannot hold in 4 bits."""
PAPER = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-7b",
    "Qwen/Qwen1.5-7B",
    "01-ai/Yi-1.5-34B",
    "deepseek-ai/deepseek-moe-16b-base",
    "mistralai/Mixtral-8x7B-v0.1",
)
COMMANDS = tuple(f"python -m studies families --model {name}" for name in PAPER)


def run(settings: Settings) -> Outcome:
    """Find each family's rate for PiSSA and for LoRA, then train every method there with every seed.

    As in the paper all methods have one rate, PiSSA's; LoRA runs at its own beside it.
    """
    tasks = {family: cache(task) for family, task in _tasks(settings).items()}

    def measure(task: LanguageTask, /, method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        return cell(settings, task, recipe(task, method, rate, seed))

    searches: dict[str, Search] = {}
    keys = []
    for family, task in tasks.items():
        searches[family] = find_rates(settings, NAME, task(), ("lora", "pissa"), measure, family=family)
        best = searches[family].best
        keys += [
            {"family": family, "method": m, "seed": seed, "rate": best["lora" if m == TUNED else "pissa"]}
            | {"task": task().name, "steps": task().steps}
            for m in _methods(family)
            for seed in settings.seeds
        ]

    def trained(family: str, **key: Any) -> dict[str, Any]:
        return measure(tasks[family](), **key)

    rows = settings.grid(NAME, keys, trained)
    parts = _parts(rows, tasks)
    results = {
        "task": next(iter(tasks.values()))().name.replace("a small Llama", "small models"),
        "search": {family: search.as_dict() for family, search in searches.items()},
        "runs": rows,
        "final_loss": _table(rows, tasks, "final_loss"),
        "held_out_loss": _table(rows, tasks, "held_out_loss"),
        "parts": {name: part.as_dict() for name, part in parts.items()},
        "commands": list(COMMANDS),
    }
    edges = [f"{family} {method}" for family, search in searches.items() for method in search.at_edge]
    listed = "; ".join(
        f"{family} " + ", ".join(f"{m} {entry['mean']:.3f}" for m, entry in table.items())
        for family, table in results["final_loss"].items()
    )
    figures = f"{results['task']}, final training loss: {listed}"
    if edges:
        figures += f"; best rate at the end of its grid: {', '.join(edges)}"
    return Outcome(results, verdict_of(parts), figures)


def _table(rows: Sequence[Mapping[str, Any]], bases: Iterable[str], name: str) -> dict[str, Any]:
    return {
        family: {
            method: mean_interval(by_seed(rows, name, family=family, method=method)).as_dict()
            for method in _methods(family)
        }
        for family in bases
    }


def _tasks(settings: Settings) -> dict[str, Callable[[], LanguageTask]]:
    """Family -> what makes its task."""
    if settings.model is not None or settings.scale == "quick":
        name = "llama" if settings.model is None else model_name(settings.model)
        return {name: lambda: language_task(settings, steps=STEPS)}
    sizes = {"layers": 2, "steps": 500, "progress": settings.progress}
    small = {family: lambda family=family: small_task(str(small_lm(family, **sizes)), STEPS) for family in FAMILIES}
    return {**small, "SmolLM2-135M": lambda: language_task(settings)} if settings.scale == "full" else small


def _methods(family: str | Path) -> list[str]:
    return list(PLAIN if family in EXPERTS else (*PLAIN, *QUANTIZED))


def _parts(rows: Sequence[Mapping[str, Any]], families: Iterable[str]) -> dict[str, Interval]:
    """By how much the losses are lower from PiSSA."""
    parts = {}
    for family in families:
        pairs = {family: ("lora", "pissa"), f"{family}, LoRA at its own rate": (TUNED, "pissa")}
        if family not in EXPERTS:
            pairs[f"{family}, 4 bits"] = QUANTIZED
        for label, pair in pairs.items():
            chosen = [{"family": family, "method": method} for method in pair]
            parts[f"{label}: training loss"] = advantage(rows, "final_loss", *chosen)
            parts[f"{label}: held-out loss"] = advantage(rows, "held_out_loss", *chosen)
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """Final training loss and held-out loss of every family by method, its seeds as dots."""
    figure, panels = new_figure(2, 1, width=11, height=3.6)
    for panel, name in zip(panels, ("final_loss", "held_out_loss"), strict=True):
        table = results[name]
        families = list(table)
        for number, method in enumerate((*PLAIN, *QUANTIZED)):
            shown = [(i, f) for i, f in enumerate(families) if method in table[f]]
            entries = [table[family][method] for _, family in shown]
            places = [place + 0.16 * (number - 2) for place, _ in shown]
            look = look_of("lora" if method == TUNED else method)
            style = {"color": look.colour, "alpha": 0.5 if method == TUNED else 1.0}
            style |= {"hatch": "///", "edgecolor": "white"} if method in QUANTIZED else {}
            panel.bar(places, [e["mean"] for e in entries], width=0.14, label=method, **style)
            for place, entry in zip(places, entries, strict=True):
                panel.plot([place] * len(entry["values"]), entry["values"], "k.", markersize=4)
        panel.set_xticks(range(len(families)), families)
        panel.set(ylabel="final training loss" if name == "final_loss" else "held-out loss", yscale="log")
    panels[0].legend(frameon=False, ncols=5, fontsize=8)
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "In every family of models PiSSA trains to a lower loss than LoRA, and QPiSSA than QLoRA (after PiSSA, figure 6, "
    "which has accuracies)",
    run,
    draw,
    minutes=23,
)
