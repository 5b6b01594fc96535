"""Code: learned from MBPP's training part, scored by pass@1 on HumanEval and MBPP, as `pissa eval` scores them.

A model is asked for a function as it was in training, and what it writes is run only where the user allows that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pissa.errors import DataError
from pissa.evaluation.tasks.generative import problem_rows
from pissa.evaluation.tasks.programs import MBPP_TEST, ProgramTask
from pissa.evaluation.tasks.registry import EvaluationOptions, find_task

from .language import Row
from .study import Settings

FILES = {"humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp.jsonl.gz"}
"""Task -> its file in the data set of the same name."""
PARTS = {"train": range(601, 975), "validation": range(511, 601), "test": MBPP_TEST}
"""MBPP's own parts, as task ids."""
LOSS_ON = 100
"""Test problems, at most, whose held-out loss is measured."""
FLAG = "--allow-code-execution"


def trains_code(settings: Settings) -> bool:
    """Whether the model may learn to write code: it is a real one, and MBPP is at hand or its score is asked for."""
    real = settings.scale == "full" or settings.model is not None
    return real and (settings.has_data_set("mbpp") or settings.allow_code_execution)


def what_was_not_scored(settings: Settings) -> str | None:
    """Why HumanEval and MBPP have no score, and what gives them one, in words; None where they have."""
    if not trains_code(settings):
        lacks = settings.scale == "full" or settings.model is not None
        way = "set PISSA_DATA to the folder that holds mbpp/ and humaneval/" if lacks else "--full or --model trains it"
        return f"HumanEval and MBPP were not scored: no code was trained ({way}; {FLAG} lets it run and be scored)"
    if not settings.allow_code_execution:
        return f"HumanEval and MBPP were not scored: that runs code which the models wrote, and {FLAG} allows it"
    return None


def coding_rows(settings: Settings) -> dict[str, list[Row]]:
    """MBPP's "train", "validation" and "test" parts as rows to learn: each asks as the task will ask.

    Raises:
        DataError: MBPP is not at hand, or not all of it.
    """
    task = find_task("mbpp")
    assert isinstance(task, ProgramTask)
    path = settings.data_set("mbpp") / FILES["mbpp"]
    keys = {"task_id": int, "text": str, "code": str, "test_list": list}
    found = problem_rows(path, None, keys, task.remedy)
    parts = {
        part: [
            {"instruction": task.ask(row), "output": f"```python\n{row['code'].strip()}\n```"}
            for row in found
            if row["task_id"] in numbers
        ]
        for part, numbers in PARTS.items()
    }
    missing = [f"{part} (task_id {PARTS[part][0]} to {PARTS[part][-1]})" for part, rows in parts.items() if not rows]
    if missing:
        raise DataError(f"{path} has no rows for {', '.join(missing)}; give the whole of MBPP")
    return parts


def code_problems(settings: Settings) -> dict[str, list[Any]]:
    """Task -> its problems; none at all where code that a model wrote may not be run.

    Raises:
        DataError: HumanEval or MBPP is not at hand, or is something else.
    """
    if not settings.allow_code_execution:
        return {}
    found = {name: find_task(name).load(settings.data_set(name) / file) for name, file in FILES.items()}
    found["mbpp"] = [row for row in found["mbpp"] if row["task_id"] in MBPP_TEST]
    limit = settings.pick(quick=2, default=64, full=None)
    return {name: problems[:limit] for name, problems in found.items()}


def passed(settings: Settings, model: Any, tokenizer: Any, problems: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Task -> the share of its problems that the model's first program solves."""
    options = EvaluationOptions(
        template="alpaca",
        max_new_tokens=settings.pick(quick=8, default=None, full=None),
        allow_code_execution=settings.allow_code_execution,
        allow_unconfined_code=settings.allow_code_execution,
    )
    return {name: find_task(name).run(model, tokenizer, own, options).value for name, own in problems.items()}


def warn_of_gaps(settings: Settings) -> None:
    """Say what this machine cannot keep generated code from, before any of it runs."""
    if settings.progress is not None:
        for line in dict.fromkeys(line for name in FILES for line in find_task(name).warnings()):
            settings.progress.console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
