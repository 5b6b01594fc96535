"""(Q)PiSSA against (Q)LoRA in one family of models after the other: the paper's figure 6 in small.

By default a small model of each family is pretrained on generated word problems (`small_lm.py`) and adapted to kinds of
problems new to it. Real models are compared one at a time: `pissa study families --model ID` for any that is at hand,
the paper's nine in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..figures import colour_of, new_figure
from ..interval import Interval, mean_interval
from ..models import smollm2
from ..small_lm import FAMILIES, small_lm
from .judge import advantage, by_seed, looked_at, standing, verdict_of
from .language import RUNS, tiny_model
from .lm import cell, language_task, recipe
from .study import Outcome, Settings, Study, model_name

NAME = "families"
PLAIN = {"lora": "pissa"}
QUANTIZED = {"qlora": "qpissa"}
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
    """Every family, method and seed at one learning rate."""
    bases = _bases(settings)
    general = language_task(settings, steps=20, held_out=48)
    rate = settings.pick(quick=1e-3, default=2e-3, full=2e-4)
    keys = [
        {"family": family, "method": method, "seed": seed, "rate": rate, "task": general.name, "steps": general.steps}
        for family in bases
        for method in _methods(family)
        for seed in settings.seeds
    ]

    def measure(family: str, method: str, seed: int, rate: float, **_: Any) -> dict[str, Any]:
        own = replace(general, base=str(bases[family]()))
        quantized = {"quantize": "nf4", "quantize_method": "qpissa-5"} if method == "qpissa" else {}
        name = "pissa" if method == "qpissa" else method
        return cell(settings, own, recipe(own, name, rate, seed, **quantized))

    rows = settings.grid(NAME, keys, measure)
    parts = _parts(rows, bases)
    results = {
        "task": general.name,
        "rate": rate,
        "runs": rows,
        "held_out_loss": {
            family: {
                method: mean_interval(by_seed(rows, "held_out_loss", family=family, method=method)).as_dict()
                for method in _methods(family)
            }
            for family in bases
        },
        "parts": {name: part.as_dict() for name, part in parts.items()},
        "commands": list(COMMANDS),
    }
    count = {word: sum(standing(part) == word for part in parts.values()) for word in ("shown", "undecided")}
    figures = f"rate {rate:g}; gain in final training loss: " + ", ".join(
        f"{name} {part}" for name, part in parts.items()
    )
    figures += f"; shown in {count['shown']} of {len(parts)}, undecided in {count['undecided']}{looked_at(settings)}"
    return Outcome(results, verdict_of(parts), figures)


def _bases(settings: Settings) -> dict[str, Any]:
    """Family -> what gives the directory or hub id of its model."""
    if settings.model is not None:
        source = settings.model
        return {model_name(source): lambda: source}
    if settings.scale == "quick":
        return {"llama": lambda: tiny_model(settings.out / RUNS / "tiny-llama")}
    sizes = {"hidden": 128, "layers": 2, "steps": 150}
    small = {family: lambda family=family: small_lm(family, **sizes) for family in FAMILIES}
    return {**small, "SmolLM2-135M": smollm2} if settings.scale == "full" else small


def _methods(family: str | Path) -> list[str]:
    pairs = PLAIN if family in EXPERTS else {**PLAIN, **QUANTIZED}
    return [method for pair in pairs.items() for method in pair]


def _parts(rows: Sequence[Mapping[str, Any]], families: Mapping[str, Any]) -> dict[str, Interval]:
    """By how much the final training loss is lower from PiSSA."""
    parts = {}
    for family in families:
        for without, with_pissa in {**PLAIN, **QUANTIZED}.items():
            if with_pissa in _methods(family):
                label = family if without == "lora" else f"{family}, 4 bits"
                left, right = {"family": family, "method": without}, {"family": family, "method": with_pissa}
                parts[label] = advantage(rows, "final_loss", left, right)
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """Held-out loss of every family by method, its seeds as dots."""
    figure, panels = new_figure(1, 1, width=10)
    panel = panels[0]
    families = list(results["held_out_loss"])
    methods = [*PLAIN, *PLAIN.values(), *QUANTIZED, *QUANTIZED.values()]
    for number, method in enumerate(methods):
        shown = [(i, f) for i, f in enumerate(families) if method in results["held_out_loss"][f]]
        entries = [results["held_out_loss"][family][method] for _, family in shown]
        places = [place + 0.2 * (number - 1.5) for place, _ in shown]
        panel.bar(places, [e["mean"] for e in entries], width=0.18, color=colour_of(method), label=method)
        for place, entry in zip(places, entries, strict=True):
            panel.plot([place] * len(entry["values"]), entry["values"], "k.", markersize=4)
    panel.set_xticks(range(len(families)), families)
    panel.set(ylabel="held-out loss", title=f"{results['task']}, learning rate {results['rate']:g}")
    panel.legend(frameon=False)
    return figure


STUDY = Study(
    NAME,
    "In every family of models PiSSA trains to a lower loss than LoRA, and QPiSSA than QLoRA (PiSSA, figure 6)",
    run,
    draw,
    minutes=7,
)
