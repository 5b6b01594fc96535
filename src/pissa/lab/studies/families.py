"""(Q)PiSSA against (Q)LoRA in one family of models after the other: the paper's figure 6 in small.

By default a small model of each family is pretrained on generated word problems (`small_lm.py`) and adapted to kinds of
problems new to it. Real models are compared one at a time: `pissa study families --model ID` for any that is at hand,
the paper's nine in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...train.recipe import Recipe
from ..figures import colour_of, new_figure
from ..interval import Interval, mean_interval
from ..models import smollm2
from ..small_lm import FAMILIES, small_lm
from .judge import advantage, by_seed, verdict_of
from .language import RUNS, tiny_model
from .lm import LanguageTask, cell, find_rates, language_task, recipe
from .search import Search
from .study import Outcome, Settings, Study, model_name

NAME = "families"
TUNED = "lora, its own rate"
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
COMMANDS = tuple(f"pissa study families --model {name}" for name in PAPER)


def run(settings: Settings) -> Outcome:
    """Find each family's rate for PiSSA and for LoRA, then train every method there with every seed.

    As in the paper all methods have one rate, PiSSA's; LoRA runs at its own beside it.
    """
    bases = _bases(settings)
    general = language_task(settings, steps=40)
    searches: dict[str, Search] = {}
    keys = []
    for family, base in bases.items():
        task = replace(general, base=str(base()))

        def measure(task: LanguageTask, /, method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
            return cell(settings, task, _recipe(task, method, rate, seed))

        searches[family] = find_rates(settings, NAME, task, ("lora", "pissa"), measure, family=family)
        best = searches[family].best
        keys += [
            {"family": family, "method": m, "seed": seed, "rate": best["lora" if m == TUNED else "pissa"]}
            for m in _methods(family)
            for seed in settings.seeds
        ]

    def trained(family: str, method: str, seed: int, rate: float, **_: Any) -> dict[str, Any]:
        task = replace(general, base=str(bases[family]()))
        return cell(settings, task, _recipe(task, method, rate, seed))

    keys = [{**key, "task": general.name, "steps": general.steps} for key in keys]
    rows = settings.grid(NAME, keys, trained)
    parts = _parts(rows, bases)
    results = {
        "task": general.name.replace("a small Llama", "small models"),
        "search": {family: search.as_dict() for family, search in searches.items()},
        "runs": rows,
        "final_loss": _table(rows, bases, "final_loss"),
        "held_out_loss": _table(rows, bases, "held_out_loss"),
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


def _recipe(task: LanguageTask, method: str, rate: float, seed: int) -> Recipe:
    """A run's settings; QPiSSA as published, with five iterations."""
    if method == "qpissa":
        return recipe(task, "pissa", rate, seed, quantize="nf4", quantize_method="qpissa-5")
    return recipe(task, "lora" if method == TUNED else method, rate, seed)


def _table(rows: Sequence[Mapping[str, Any]], bases: Iterable[str], name: str) -> dict[str, Any]:
    return {
        family: {
            method: mean_interval(by_seed(rows, name, family=family, method=method)).as_dict()
            for method in _methods(family)
        }
        for family in bases
    }


def _bases(settings: Settings) -> dict[str, Any]:
    """Family -> what gives the directory or hub id of its model."""
    if settings.model is not None:
        source = settings.model
        return {model_name(source): lambda: source}
    if settings.scale == "quick":
        return {"llama": lambda: tiny_model(settings.out / RUNS / "tiny-llama")}
    sizes = {"layers": 2, "steps": 500, "progress": settings.progress}
    small = {family: lambda family=family: small_lm(family, **sizes) for family in FAMILIES}
    return {**small, "SmolLM2-135M": smollm2} if settings.scale == "full" else small


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
            style = {"color": colour_of("lora"), "alpha": 0.5} if method == TUNED else {"color": colour_of(method)}
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
    "In every family of models PiSSA trains to a lower loss than LoRA, and QPiSSA than QLoRA (PiSSA, figure 6)",
    run,
    draw,
    minutes=23,
)
