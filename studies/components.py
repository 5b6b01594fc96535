"""Which singular triplets should the adapter start from?

The same construction on the r largest triplets (principal, which is PiSSA), the middle ones, the smallest ones, r drawn
at random, and the r with the largest first-order effect on the loss of the training data (scored). The paper compares
at one learning rate; factors of smaller triplets are smaller, and an adapter with smaller factors moves the weight
less at the same rate, so each is compared at the principal one's rate and at its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pissa.training.recipe import Recipe

from .figures import new_figure, search_lines, seed_dots
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import LanguageTask, cell, find_rates, language_task, recipe
from .study import Outcome, Settings, Study

NAME = "components"
COMPONENTS = ("principal", "medium", "minor", "random", "scored")
CLAIMED = ("medium", "minor")
"""What figure 8 has beside the principal ones."""
SCORED_EXAMPLES = 16


def run(settings: Settings) -> Outcome:
    """Find each component's learning rate, then train it there and at the principal one's with every seed."""
    task = language_task(settings)
    rank = settings.pick(quick=4, default=8, full=16)

    def measure(
        task: LanguageTask, /, method: str, rate: float, seed: int, rank: int, solved: bool = False, **_: Any
    ) -> dict[str, Any]:
        return cell(settings, task, recipe_of(task, method, rank, rate, seed), solved=solved)

    search = find_rates(settings, NAME, task, COMPONENTS, measure, rank=rank)
    runs = {
        (component, rate) for component in COMPONENTS for rate in (search.best["principal"], search.best[component])
    }
    keys = [
        {"method": component, "rate": rate, "seed": seed, "rank": rank, "task": task.name, "steps": task.steps}
        for component, rate in sorted(runs)
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key, solved=True))
    parts = _parts(rows, search.best)
    results = {
        "task": task.name,
        "search": search.as_dict(),
        "runs": rows,
        "at_one_rate": _table(rows, dict.fromkeys(COMPONENTS, search.best["principal"])),
        "at_its_own": _table(rows, search.best),
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    figures = "; ".join(
        f"held-out loss {words}: " + ", ".join(f"{c} {entry['mean']:.3f}" for c, entry in results[name].items())
        for words, name in (("at one rate", "at_one_rate"), ("each at its own", "at_its_own"))
    )
    return Outcome(results, verdict_of(parts), f"{task.name}; {figures}; rates {search}")


def recipe_of(task: LanguageTask, component: str, rank: int, rate: float, seed: int) -> Recipe:
    """A run's settings."""
    if component == "random":
        return recipe(task, "random-pissa", rate, seed, rank=rank)
    scored = {"scored_examples": min(SCORED_EXAMPLES, len(task.train))} if component == "scored" else {}
    return recipe(task, "pissa", rate, seed, rank=rank, component=component, **scored)


def _table(rows: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> dict[str, Any]:
    found = {c: by_seed(rows, "held_out_loss", method=c, rate=rate) for c, rate in rates.items()}
    return {component: mean_interval(values).as_dict() for component, values in found.items()}


def _parts(rows: Sequence[Mapping[str, Any]], best: Mapping[str, float]) -> dict[str, Interval]:
    """Each other component's loss less the principal one's, at one rate and each at its own."""
    principal = {"method": "principal", "rate": best["principal"]}

    def above(value: str, component: str, rate: float) -> Interval:
        return advantage(rows, value, {"method": component, "rate": rate}, principal)

    parts = {}
    for component in CLAIMED:
        for value, words in (("final_loss", "training"), ("held_out_loss", "held-out")):
            one = f"{words} loss of {component} above principal, at one rate"
            parts[one] = above(value, component, best["principal"])
            parts[one.replace("at one rate", "each at its own")] = above(value, component, best[component])
    return parts


def draw(results: Mapping[str, Any]) -> Any:
    """The search over learning rates, and the held-out loss at the principal one's rate and at each one's own."""
    figure, (search, one, own) = new_figure(1, 3)
    search_lines(search, results["search"])
    seed_dots(one, results["at_one_rate"], f"held-out loss, all at {results['search']['best']['principal']:.2g}")
    seed_dots(own, results["at_its_own"], "held-out loss, each at its own rate")
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "Adapters that start at the principal singular triplets reach a lower loss than those that start at the medium or "
    "the minor ones (PiSSA, appendix F, figure 8)",
    run,
    draw,
    minutes=18,
    seed_count=5,
)
