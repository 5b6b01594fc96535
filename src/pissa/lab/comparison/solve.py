"""Which problems a model solves: those of a task of `pissa eval`, or the test problems by the answers they state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...evaluation.task import EvaluationOptions
from ...evaluation.task import Task as EvaluationTask
from ...evaluation.tasks.registry import find_task
from .plan import USUAL, ComparisonPlan
from .task import Task


@dataclass(frozen=True)
class Solver:
    """A task, its problems, and how they are put."""

    task: EvaluationTask
    tokenizer: Any
    problems: Sequence[Any]
    options: EvaluationOptions

    def correct(self, model: Any, limit: int | None = None) -> list[bool]:
        """Whether the model solves each of the first problems."""
        found = self.task.run(model, self.tokenizer, list(self.problems)[:limit], self.options)
        return [bool(sample["correct"]) for sample in found.samples]


def make_solver(task: Task, tokenizer: Any, plan: ComparisonPlan) -> Solver | None:
    """The solver of a plan; None where nothing is to be solved.

    Raises:
        ConfigError: problems that are not of the task's kind.
        DataError: the problems' file cannot be read.
    """
    count = plan.accuracy_problems
    if count == 0:
        return None
    if plan.evaluation is None:
        if count is None and not task.has_answers and not plan.curve_accuracy:
            return None
        if not task.has_answers:
            raise ConfigError(
                "an accuracy is asked for (accuracy_problems or curve_accuracy), and not every test problem ends in "
                '"The answer is: N" or "#### N"; leave that out, or name a task with --eval'
            )
    found = find_task(plan.evaluation or USUAL)
    generates = "max_new_tokens" in found.settings
    options = EvaluationOptions(
        template=plan.recipe.template,
        max_new_tokens=plan.new_tokens if generates else None,
        allow_code_execution=plan.allow_code_execution,
        allow_unconfined_code=plan.allow_unconfined_code,
    )
    found.check(options)
    if plan.evaluation_data is not None:
        return _solver(found, tokenizer, found.load(plan.evaluation_data, count), options)
    if not task.has_answers:
        raise ConfigError(
            f'task {found.name} reads its answers from "The answer is: N" or "#### N", and not every test problem ends '
            "so; give a file that does with --eval-data"
        )
    return _solver(found, tokenizer, task.test[:count], options)


def _solver(task: EvaluationTask, tokenizer: Any, problems: Sequence[Any], options: EvaluationOptions) -> Solver:
    if len(problems) < 2:
        raise ConfigError("one problem makes no accuracy to compare; give at least 2, or accuracy_problems 0")
    return Solver(task, tokenizer, problems, options)
