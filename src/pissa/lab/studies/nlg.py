"""Solving problems by generation: the paper's table 2 in small, and table 9's accuracies with a base in few bits.

What is scored is the share of held-out problems whose generated solution states the right answer. By default the small
Llama learns kinds of word problems new to it; `--full`, or `--model`, takes GSM8K. Code is learned from MBPP's training
part with `--full`, and judged by its held-out loss: code that a model wrote is only run where a user allows it
(`pissa eval --task mbpp --allow-code-execution`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...checkpoint.read import load_base, load_tokenizer
from ...errors import DataError
from ..figures import colour_of, new_figure
from ..interval import Interval, mean_interval
from .judge import advantage, by_seed, looked_at, sentence, verdict_of
from .lm import LanguageTask, cell, language_task, recipe, share_solved
from .study import Outcome, Settings, Study

NAME = "nlg"
METHODS = ("full", "lora-gaussian", "lora", "pissa")
FORMATS = ("nf4", "int8")
QUANTIZED = tuple(f"{form} {method}" for form in FORMATS for method in ("lora", "pissa"))


def run(settings: Settings) -> Outcome:
    """Every method, and the adapters once more on a base in few bits, with every seed."""
    task = language_task(settings, steps=60, held_out=settings.pick(quick=4, default=64, full=400))
    rates: dict[str, float] = settings.pick(
        quick=dict.fromkeys(METHODS, 1e-3),
        default={"full": 1e-3, "lora-gaussian": 8e-3, "lora": 8e-3, "pissa": 4e-3},
        full={"full": 2e-5, "lora-gaussian": 1e-3, "lora": 1e-3, "pissa": 2e-4},
    )
    quantized = settings.pick(quick=QUANTIZED[1:2], default=QUANTIZED, full=QUANTIZED)
    methods = settings.pick(quick=METHODS[2:], default=METHODS, full=METHODS)
    tasks = {"problems": task, **({"code": _code(settings, task)} if settings.scale == "full" else {})}
    keys = [
        {"part": part, "method": method, "seed": seed, "rate": rates[method.split()[-1]], "steps": own.steps}
        for part, own in tasks.items()
        for method in (*methods, *(quantized if part == "problems" else ()))
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: _measure(settings, tasks[key["part"]], **key))
    before = settings.grid(NAME, [{"part": "base", "task": task.name}], lambda **_: {"exact_match": _base(task)})
    shown = ("exact_match", "held_out_loss")
    table = {
        part: {
            method: {
                name: mean_interval(by_seed(rows, name, part=part, method=method)).as_dict()
                for name in (shown if part == "problems" else shown[1:])
            }
            for method in dict.fromkeys(key["method"] for key in keys if key["part"] == part)
        }
        for part in tasks
    }
    parts = _parts(rows)
    results = {
        "task": task.name,
        "runs": rows,
        "base": before[0]["exact_match"],
        "table": table,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}, share solved (base {results['base']:.3f}): " + ", ".join(
        f"{method} {entry['exact_match']['mean']:.3f}" for method, entry in table["problems"].items()
    )
    if "code" in table:
        figures += "; held-out loss on code: " + ", ".join(
            f"{method} {entry['held_out_loss']['mean']:.3f}" for method, entry in table["code"].items()
        )
    return Outcome(results, verdict_of(parts), f"{figures}; {sentence(parts)}{looked_at(settings)}")


def _measure(
    settings: Settings, task: LanguageTask, part: str, method: str, seed: int, rate: float, steps: int
) -> dict[str, Any]:
    form, _, name = method.rpartition(" ")
    few: dict[str, Any] = (
        {"quantize": form, "quantize_method": "qpissa-5" if name == "pissa" else "qlora"} if form else {}
    )
    found = cell(settings, task, recipe(task, name, rate, seed, **few), solved=part != "code")
    return {"exact_match" if entry == "solved" else entry: value for entry, value in found.items()}


def _base(task: LanguageTask) -> float:
    return share_solved(load_base(task.base, dtype="float32").eval(), load_tokenizer(task.base), task)


def _code(settings: Settings, task: LanguageTask) -> LanguageTask:
    """MBPP: its training part to learn, its first test problems for the loss."""
    path = settings.data_set("mbpp") / "mbpp.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        rows = {
            row["task_id"]: {"instruction": f"{row['text']}\n{row['test_list'][0]}", "output": row["code"]}
            for row in found
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} cannot be read as MBPP: {error}") from error
    parts = [[row for number, row in rows.items() if number in part] for part in (range(601, 975), range(11, 111))]
    return replace(task, name=f"{task.name.split(' on ')[0]} on MBPP", train=parts[0], held_out=parts[1])


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    def versus(left: str, right: str) -> Interval:
        chosen = {"part": "problems"}
        return advantage(rows, "exact_match", {**chosen, "method": left}, {**chosen, "method": right})

    pairs = {
        "PiSSA − LoRA (Kaiming)": ("pissa", "lora"),
        "PiSSA − LoRA (Gaussian)": ("pissa", "lora-gaussian"),
        "PiSSA − full": ("pissa", "full"),
        **{f"{form}: PiSSA − LoRA": (f"{form} pissa", f"{form} lora") for form in FORMATS},
    }
    trained = {row["method"] for row in rows}
    return {name: versus(*pair) for name, pair in pairs.items() if trained.issuperset(pair)}


def draw(results: Mapping[str, Any]) -> Any:
    """Share solved and held-out loss of every method, its seeds as dots."""
    figure, panels = new_figure(1, 2)
    table = results["table"]["problems"]
    for panel, name, title in zip(
        panels, ("exact_match", "held_out_loss"), ("share solved", "held-out loss"), strict=True
    ):
        for place, (method, entry) in enumerate(table.items()):
            panel.barh(place, entry[name]["mean"], color=colour_of(method.split()[-1]))
            panel.plot(entry[name]["values"], [place] * len(entry[name]["values"]), "k.", markersize=4)
        panel.set_yticks(range(len(table)), list(table))
        panel.invert_yaxis()
        panel.set_title(title)
    panels[0].axvline(results["base"], color=colour_of("base"), linewidth=1)
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Fine-tuned with PiSSA a model solves more problems than with LoRA or in full, also on a base in 4 or 8 bits "
    "(PiSSA, tables 2 and 9)",
    run,
    draw,
    minutes=5,
)
