"""What is compared, and how many runs of how many steps that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from ...config.kinds import Count, CountFromTwo, CountFromZero, File, Name, Names
from ...config.settings import Rule, check_settings, did_you_mean
from ...errors import ConfigError
from ...evaluation.tasks.registry import check_task_name
from ...training.rate_search import FIRST
from ...training.recipe import ADAPTER_ONLY, TRAINING_METHODS, Recipe

MOST_SEARCH_RUNS = 12
"""Rung 0 has at most so many runs: after as many the gaps between rates are below 5 %."""
OWN = {"method": "methods", "learning_rate": "rates (--lrs)", "max_steps": "steps", "epochs": "steps", "seed": "seed"}
"""Settings of a run that a comparison chooses itself, and what it is told instead."""
USUAL = "gsm8k"
"""The task that compares the answers that solution and reference state."""
UNDECIDED = ("perplexity", "mt-bench", "glue/stsb")
"""Tasks that judge nothing right or wrong."""
NULL_METHOD = "lora"
NULL_SEED = 500
Seeds = Annotated[int, Rule(f"allowed: 1 to {NULL_SEED}", lambda value: 1 <= value <= NULL_SEED)]
SearchRuns = Annotated[
    int, Rule(f"allowed: {FIRST} to {MOST_SEARCH_RUNS}", lambda value: FIRST <= value <= MOST_SEARCH_RUNS)
]
Rungs = Annotated[int, Rule("allowed: 1 to 4", lambda value: 1 <= value <= 4)]
SEARCH_SEED = 1000
"""Added to the comparison's seed: no run shares its seed with one of another purpose."""


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison's settings.

    Raises:
        ConfigError: a value out of its range, a method that the recipe does not fit, or a budget that is too small.

    Example:
        >>> from pissa import ComparisonPlan, Recipe
        >>> plan = ComparisonPlan(("lora", "pissa"), Recipe(rank=8), steps=50, seeds=3)
        >>> print(plan.describe())
        lora, pissa | search, for each method: 6 runs of 13 steps and 3 runs of 25 steps (153 steps) | ...
    """

    panel: ClassVar[str] = "Comparison"

    methods: Names = ("lora", "pissa")
    """What is compared, in the order of the report: methods of pissa train, separated by commas."""
    recipe: Recipe = field(default_factory=Recipe)
    """What all runs share; its method, learning rate, steps and seed are the comparison's to choose."""
    steps: Count = 100
    """How many steps every reported run has."""
    seeds: Seeds = 5
    """How many runs of each method are reported."""
    rates: tuple[float, ...] | None = None
    """Learning rates: None searches each method's own; several are the grid for all; a single one is fixed."""
    search_runs: SearchRuns = 6
    """How many runs each method has in the search's first rung, and half as many in each further one. Used only when
    the learning rates are searched."""
    rungs: Rungs = 2
    """How many rungs the search has; the last is half as long as a reported run, each earlier one half as long as the
    next."""
    null: bool = True
    """Also run LoRA again under as many other seeds, and compare it with itself."""
    validation_rows: Count = 100
    """How many rows at most the learning rates are chosen by."""
    test_rows: CountFromTwo = 200
    """How many rows at most are reported on."""
    evaluation: Name | None = None
    """A task of pissa eval whose problems are solved. Left out, the test problems are, by the answers they state."""
    evaluation_data: File | None = None
    """File with that task's problems. Left out, the test problems, where they are of that kind."""
    allow_code_execution: bool = False
    """Let code that the models wrote run on this machine; humaneval and mbpp do nothing without it."""
    allow_unconfined_code: bool = False
    """Let that code run also where this machine cannot keep it from everything that it should not do."""
    accuracy_problems: CountFromZero | None = None
    """How many problems are solved by generating. Left out, all where every answer is marked, else none."""
    new_tokens: Count = 256
    """How many tokens a generated solution may have."""
    curve_points: CountFromZero = 4
    """How often a reported run's test loss is measured while it trains; 0 is never."""
    curve_problems: Count = 32
    """How many test problems are measured each time."""
    curve_accuracy: bool = False
    """Solve them too, each time."""
    forgetting: File | None = None
    """Text whose perplexity is measured before and after: .txt, or rows as .jsonl, .json or .parquet."""
    seed: CountFromZero = 0
    """Seed of the parts of the data, and the first of the runs' seeds."""
    keep_runs: bool = False
    """Keep the weights and checkpoints of all runs."""

    def __post_init__(self) -> None:
        check_settings(self)
        _check_rates(self)
        _check_methods(self)
        _check_task(self)
        if self.rates is not None:
            object.__setattr__(self, "rates", tuple(sorted(set(self.rates))))
        recipes = [self.run_recipe(method, 1e-5, self.steps, self.seed) for method in self.methods]
        assert len(recipes) == len(self.methods)  # each has checked itself

    @property
    def searches(self) -> bool:
        """Whether a learning rate is to be chosen at all."""
        return self.rates is None or len(self.rates) > 1

    @property
    def rung_runs(self) -> tuple[int, ...]:
        """Runs per method in each rung of the search."""
        first = self.search_runs if self.rates is None else len(self.rates)
        return tuple(max(1, first // 2**rung) for rung in range(self.rungs)) if self.searches else ()

    @property
    def rung_steps(self) -> tuple[int, ...]:
        """Steps of a run in each rung."""
        return tuple(math.ceil(self.steps / 2 ** (self.rungs - rung)) for rung in range(len(self.rung_runs)))

    @property
    def budget(self) -> int:
        """Steps of the search, for each method."""
        return sum(runs * steps for runs, steps in zip(self.rung_runs, self.rung_steps, strict=True))

    @property
    def null_method(self) -> str | None:
        """What is compared with itself; None for nothing."""
        return null_method_of(self.methods) if self.null else None

    @property
    def total_steps(self) -> int:
        """How many steps all runs take together."""
        arms = len(self.methods) + (self.null_method is not None)
        return len(self.methods) * self.budget + arms * self.seeds * self.steps

    def run_recipe(self, method: str, rate: float, steps: int, seed: int) -> Recipe:
        """One run's recipe; full fine-tuning leaves out what only adapters have."""
        usual = Recipe()
        unused = {name: getattr(usual, name) for name in ADAPTER_ONLY} if method == "full" else {}
        own: dict[str, Any] = {"method": method, "learning_rate": rate, "max_steps": steps, "seed": seed}
        return replace(self.recipe, **{**unused, **own})

    def search_seed(self, rung: int) -> int:
        """The seed of the runs of a rung; all methods share it."""
        return self.seed + SEARCH_SEED * (rung + 1)

    def final_seeds(self) -> Iterator[int]:
        """The seeds of the reported runs."""
        yield from range(self.seed, self.seed + self.seeds)

    def null_seeds(self) -> Iterator[int]:
        """The seeds of the null arm's runs."""
        yield from range(self.seed + NULL_SEED, self.seed + NULL_SEED + self.seeds)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The whole plan in a line or two, for people."""
        names = ", ".join(self.methods)
        if self.searches:
            rungs = zip(self.rung_runs, self.rung_steps, strict=True)
            parts = " and ".join(f"{runs} runs of {steps} steps" for runs, steps in rungs)
            search = f"search, for each method: {parts} ({self.budget} steps)"
        else:
            search = f"learning rate {(self.rates or (0,))[0]:g} for all, no search"
        null = f"; {self.null_method} again under {self.seeds} other seeds" if self.null_method else ""
        final = f"then {self.seeds} runs of {self.steps} steps each{null}"
        return f"{names} | {search} | {final} | {self.total_steps} steps in all"


def null_method_of(methods: Sequence[str]) -> str:
    """Which of them is compared with itself."""
    return NULL_METHOD if NULL_METHOD in methods else methods[0]


def search_runs_within(budget: int, steps: int, rungs: int) -> int:
    """How many runs the first rung may have so that a method's search takes at most `budget` steps.

    Raises:
        ConfigError: too few steps for the smallest search.
    """
    for runs in range(MOST_SEARCH_RUNS, FIRST - 1, -1):
        if ComparisonPlan(steps=steps, rungs=rungs, search_runs=runs).budget <= budget:
            return runs
    least = ComparisonPlan(steps=steps, rungs=rungs, search_runs=FIRST).budget
    raise ConfigError(
        f"a budget of {budget} steps per method is too small for a search over runs of {steps} steps; give at least "
        f"{least}, or name the learning rates"
    )


def read_rates(text: str) -> tuple[float, ...] | None:
    """Learning rates as they are given on the command line: `auto`, or numbers separated by commas.

    Raises:
        ConfigError: anything else.
    """
    if text.strip() == "auto":
        return None
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"learning rates {text!r}; give auto, or positive numbers separated by commas (1e-4,3e-4)")
    return rates


def _check_rates(plan: ComparisonPlan) -> None:
    for rate in plan.rates or ():
        if not 0 < rate < math.inf:
            raise ConfigError(f"learning rate {rate!r}; give positive numbers")
    if plan.rates is not None and not plan.rates:
        raise ConfigError("no learning rate is given; name some, or leave them out to have them searched")


def _check_task(plan: ComparisonPlan) -> None:
    """Refuse settings that nothing would use, and tasks without a right and wrong."""
    if plan.evaluation is None and plan.evaluation_data is not None:
        raise ConfigError("evaluation_data (--eval-data) is of a task; name it with --eval")
    if plan.evaluation is None and plan.allow_code_execution:
        raise ConfigError("allow_code_execution (--allow-code-execution) is of a task; name it with --eval")
    if plan.evaluation is not None:
        check_task_name(plan.evaluation)
    if plan.evaluation in UNDECIDED:
        instead = "--forgetting" if plan.evaluation == "perplexity" else "pissa eval on a run (--keep-runs)"
        raise ConfigError(f"task {plan.evaluation} judges nothing right or wrong; {instead} measures it")
    if plan.evaluation not in (None, USUAL) and plan.evaluation_data is None:
        raise ConfigError(f"task {plan.evaluation} has problems of its own; give their file with --eval-data")
    if plan.accuracy_problems == 0 and (plan.evaluation is not None or plan.curve_accuracy):
        raise ConfigError("accuracy_problems is 0, so that nothing is solved; leave it out, or leave the task out")


def _check_methods(plan: ComparisonPlan) -> None:
    usual = Recipe()
    given = [name for name in OWN if getattr(plan.recipe, name) != getattr(usual, name)]
    if given:
        instead = ", ".join(dict.fromkeys(OWN[name] for name in given))
        raise ConfigError(f"the recipe sets {', '.join(given)}, which a comparison chooses; give it {instead} instead")
    unknown = [method for method in plan.methods if method not in TRAINING_METHODS]
    if unknown:
        near = did_you_mean(unknown[0], TRAINING_METHODS)
        raise ConfigError(f"no such method: {', '.join(unknown)}; known: {', '.join(TRAINING_METHODS)}{near}")
    if not plan.methods:
        raise ConfigError(f"no method to compare; known: {', '.join(TRAINING_METHODS)}")
    twice = sorted({method for method in plan.methods if plan.methods.count(method) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} named twice; the null arm compares a method with itself")
