"""Solving problems by generation: the paper's table 2 in small, and table 9's accuracies with a base in few bits.

What is scored is the share of test problems whose generated solution states the right answer, as task gsm8k of
`pissa eval` has it. By default the small Llama learns rare kinds of word problems; `--full`, or `--model`, takes a real
model, and `--full` GSM8K. A real model also learns code, from MBPP's training part, and is scored by pass@1 on
HumanEval and MBPP where the user allows what it wrote to run (`coding.py`). Every method has the learning rate that
suits it best on problems apart (`search.py`).

With a base in few bits (`few_bits.py`), what the bits cost before any training stands beside what training makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pissa.colours import INK
from pissa.evaluation.sandbox import gaps

from .coding import LOSS_ON, code_problems, coding_rows, passed, trains_code, warn_of_gaps, what_was_not_scored
from .few_bits import FORMATS
from .figures import new_figure, seed_dots
from .interval import Interval, mean_interval, paired_difference
from .judge import advantage, by_seed, verdict_of
from .lm import LanguageTask, find_rates, language_task, share_solved
from .solving import BASE, RANK, Part
from .study import Outcome, Settings, Study, model_name

NAME = "nlg"
METHODS = ("full", "lora-gaussian", "lora", "pissa")
QUANTIZED = tuple(f"{form} {method}" for form in FORMATS for method in ("lora", "pissa"))
LOSS = "held_out_loss"
Rows = Sequence[Mapping[str, Any]]


def run(settings: Settings) -> Outcome:
    """Every method, and the adapters once more on a base in few bits, each at its own rate with every seed."""
    first = _problems(settings)
    parts = [first, _code(settings, first.task)] if trains_code(settings) else [first]
    rows, starts, searches = [], [], {}
    for part in parts:
        about = {"part": part.name, "task": part.task.name, "steps": part.task.steps, "scores": list(part.scores)}
        starts += settings.grid(NAME, [{"start": name, **about} for name in (BASE, *part.quantized)], part.untrained)
        search = find_rates(settings, NAME, part.task, part.methods, part.trained, part=part.name)
        keys = [
            {"method": method, "rate": search.best[method], "seed": seed, **about}
            for method in part.methods
            for seed in settings.seeds
        ]
        rows += settings.grid(NAME, keys, partial(part.trained, part.task, scored=True))
        searches[part.name] = search
    return _outcome(settings, parts, rows, starts, searches)


def _problems(settings: Settings) -> Part:
    task = language_task(settings, held_out=settings.pick(quick=4, default=128, full=400))
    plain = settings.pick(quick=METHODS[2:], default=METHODS, full=METHODS)
    quantized = settings.pick(quick=QUANTIZED[-2:], default=QUANTIZED, full=QUANTIZED)

    def solved(model: Any, tokenizer: Any) -> dict[str, float]:
        return {"solved": share_solved(model, tokenizer, task)}

    return Part(settings, "problems", task, (*plain, *quantized), ("solved",), solved)


def _code(settings: Settings, task: LanguageTask) -> Part:
    rows, problems = coding_rows(settings), code_problems(settings)
    name, few = f"{model_name(task.base)} on MBPP", settings.pick(quick=2, default=LOSS_ON, full=LOSS_ON)
    own = replace(
        task, name=name, train=rows["train"], validation=rows["validation"][:few], held_out=rows["test"][:few]
    )
    if problems:
        warn_of_gaps(settings)

    def solved(model: Any, tokenizer: Any) -> dict[str, float]:
        return passed(settings, model, tokenizer, problems)

    methods = settings.pick(quick=METHODS[2:], default=METHODS, full=METHODS)
    return Part(settings, "code", own, methods, tuple(problems), solved)


def _outcome(
    settings: Settings, parts: Sequence[Part], rows: Rows, starts: Rows, searches: Mapping[str, Any]
) -> Outcome:
    table, before = {}, {}
    for part in parts:
        measured = (*part.scores, LOSS)
        table[part.name] = {
            method: {
                name: mean_interval(by_seed(rows, name, part=part.name, method=method)).as_dict() for name in measured
            }
            for method in part.methods
        }
        own = [row for row in starts if row["part"] == part.name]
        before[part.name] = {row["start"]: {name: row[name] for name in measured} for row in own}
    differences = _differences(rows, starts)
    results = {
        "tasks": {part.name: part.task.name for part in parts},
        "rank": RANK,
        "search": {name: search.as_dict() for name, search in searches.items()},
        "runs": list(rows),
        "starts": list(starts),
        "before": before,
        "table": table,
        "code_could_reach": list(gaps()) if any(part.name == "code" and part.scores for part in parts) else None,
        "parts": {name: part.as_dict() for name, part in differences.items()},
    }
    lines = [_line(part, before[part.name], table[part.name], searches[part.name]) for part in parts]
    fitted = "under gptq QPiSSA's factors are fitted to the calibration text as well"
    said = [
        *lines,
        fitted if any("gptq" in method for method in table[parts[0].name]) else "",
        what_was_not_scored(settings),
    ]
    return Outcome(results, verdict_of(differences), "; ".join(text for text in said if text))


def _line(part: Part, before: Mapping[str, Any], table: Mapping[str, Any], search: Any) -> str:
    """What became of the base under every method, by every score and by the loss."""

    def shown(name: str) -> str:
        means = [
            f"{method} " + (f"{before[method][name]:.3f} → " if method in before else "") + f"{entry[name]['mean']:.3f}"
            for method, entry in table.items()
        ]
        return f"{name.replace('_', ' ')} (base {before[BASE][name]:.3f}): {', '.join(means)}"

    return f"{part.task.name}, {'; '.join(map(shown, (*part.scores, LOSS)))}; rates {search}"


def _differences(rows: Rows, starts: Rows) -> dict[str, Interval]:
    """The parts of the claim, as differences that are positive where they hold."""
    trained = {(row["part"], row["method"]) for row in rows}

    def versus(part: str, score: str, left: str, right: str) -> Interval | None:
        if not trained.issuperset({(part, left), (part, right)}):
            return None
        chosen = {"part": part}
        return advantage(rows, score, {**chosen, "method": left}, {**chosen, "method": right})

    names = {"lora": "LoRA (Kaiming)", "lora-gaussian": "LoRA (Gaussian)", "full": "full"}
    scored = {"problems": ["solved"], "code": next((r["scores"] for r in rows if r["part"] == "code"), [])}
    found = {
        f"PiSSA − {name}" + (f", {score}" if part == "code" else ""): versus(part, score, "pissa", other)
        for part, scores in scored.items()
        for score in scores
        for other, name in names.items()
    }
    for form in FORMATS:
        lora, pissa = f"{form} lora", f"{form} pissa"
        found[f"{form}: PiSSA − LoRA"] = versus("problems", "solved", pissa, lora)
        away = _distances(starts)
        if lora in away and pissa in away:
            found[f"{form}, untrained: PiSSA nearer to the base by"] = paired_difference(away[lora], away[pissa])
    return {name: difference for name, difference in found.items() if difference is not None}


def _distances(starts: Rows) -> dict[str, list[float]]:
    """By how much few bits change the loss of each test problem, in nats a token, up or down."""
    own = {row["start"]: row["loss_by_problem"] for row in starts if row["part"] == "problems"}
    return {
        start: [abs(changed - base) for changed, base in zip(losses, own[BASE], strict=True)]
        for start, losses in own.items()
    }


def draw(results: Mapping[str, Any]) -> Any:
    """Every score and the held-out loss of every method, seeds as dots; hollow, what few bits were before training."""
    table, before = results["table"], results["before"]
    measured = [(part, name) for part, methods in table.items() for name in next(iter(methods.values()))]
    figure, panels = new_figure((len(measured) + 1) // 2, 2)
    for panel, (part, name) in zip(panels, measured, strict=False):
        seed_dots(panel, {method: entry[name] for method, entry in table[part].items()}, "")
        for place, method in enumerate(table[part]):
            if method in before[part]:
                panel.plot(before[part][method][name], place, "ko", markersize=6, fillstyle="none")
        panel.axvline(before[part][BASE][name], color=INK, linewidth=1)
        panel.set_title(f"{results['tasks'][part]}: {name.replace('_', ' ')}", fontsize=9)
    for panel in panels[len(measured) :]:
        panel.set_visible(False)
    return figure


STUDY = Study(
    NAME,
    "Fine-tuned with PiSSA a model solves more problems than with LoRA or in full, also on a base in NF4, INT8 or "
    "GPTQ's 4 bits, which PiSSA leaves nearer to the model it was (PiSSA, tables 2 and 9)",
    run,
    draw,
    minutes=20,
    seed_count=5,
)
