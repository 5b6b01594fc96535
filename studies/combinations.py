"""PiSSA's initialisation under DoRA and AdaLoRA: does each of the three gain from it, as in the paper's table 5?

The paper compares at one rate. Here each pair is compared twice: at the rate that suits its PiSSA side, which is such a
comparison, and each side at its own, which is the fairer question. AdaLoRA keeps its ranks, with PiSSA and without: so
short a run has no steps in which to share them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import new_figure, search_lines, seed_dots
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import LanguageTask, cell, find_rates, language_task, recipe
from .study import Outcome, Settings, Study

NAME = "combinations"
PAIRS = {"lora": "pissa", "dora": "pissa+dora", "adalora": "pissa+adalora"}
NAMES = {"lora": "vanilla", "dora": "DoRA", "adalora": "AdaLoRA"}


def run(settings: Settings) -> Outcome:
    """Find each method's rate, then train every pair at both with every seed."""
    task = language_task(settings)
    pairs = PAIRS if settings.scale != "quick" else {"lora": "pissa"}
    methods = [method for pair in pairs.items() for method in pair]

    def measure(
        task: LanguageTask, /, method: str, rate: float, seed: int, solved: bool = False, **_: Any
    ) -> dict[str, Any]:
        return cell(settings, task, recipe(task, method, rate, seed), solved=solved)

    search = find_rates(settings, NAME, task, methods, measure)
    runs = {(method, search.best[method]) for method in methods}
    runs |= {(without, search.best[with_pissa]) for without, with_pissa in pairs.items()}
    keys = [
        {"method": method, "rate": rate, "seed": seed, "task": task.name, "steps": task.steps}
        for method, rate in sorted(runs)
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key, solved=True))
    parts = _parts(rows, pairs, search.best)
    table = {
        method: {
            name: mean_interval(by_seed(rows, name, method=method, rate=search.best[method])).as_dict()
            for name in ("held_out_loss", "solved")
        }
        for method in methods
    }
    results = {
        "task": task.name,
        "pairs": pairs,
        "search": search.as_dict(),
        "runs": rows,
        "table": table,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = f"{task.name}; held-out loss (share solved) at each method's rate: " + ", ".join(
        f"{method} {entry['held_out_loss']['mean']:.3f} ({entry['solved']['mean']:.2f})"
        for method, entry in table.items()
    )
    return Outcome(results, verdict_of(parts), f"{figures}; rates {search}")


def _parts(
    rows: Sequence[Mapping[str, Any]], pairs: Mapping[str, str], best: Mapping[str, float]
) -> dict[str, Interval]:
    """By how much each method's held-out loss falls when it starts from PiSSA."""
    parts = {}
    for without, with_pissa in pairs.items():
        started = {"method": with_pissa, "rate": best[with_pissa]}
        for words, rate in (("at PiSSA's rate", best[with_pissa]), ("each at its own rate", best[without])):
            plain = {"method": without, "rate": rate}
            parts[f"{NAMES[without]}, {words}: gain in held-out loss from PiSSA"] = advantage(
                rows, "held_out_loss", plain, started
            )
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """The search over learning rates, then held-out loss and share of problems solved at each method's rate."""
    figure, panels = new_figure(1, 3, width=4.4)
    search_lines(panels[0], results["search"], {without: {"linestyle": "--"} for without in results["pairs"]})
    titles = {"held_out_loss": "held-out loss", "solved": "share of problems solved"}
    for panel, (name, title) in zip(panels[1:], titles.items(), strict=True):
        seed_dots(panel, {method: entry[name] for method, entry in results["table"].items()}, title)
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "LoRA, DoRA and AdaLoRA each get better when they start from PiSSA (PiSSA, appendix A, table 5)",
    run,
    draw,
    minutes=17,
    seed_count=5,
)
