"""The tasks by name.

task = find_task("gsm8k")
problems = task.load("test.jsonl", limit=100)
evaluation = task.run(model, tokenizer, problems)       # .metric .value .interval .samples
"""

from __future__ import annotations

from importlib import import_module

from ...config.settings import did_you_mean
from ...errors import ConfigError
from ..task import Evaluation, EvaluationOptions, Task
from .glue_tasks import GLUE_TASKS

__all__ = ["Evaluation", "EvaluationOptions", "Task", "check_task_name", "find_task", "task_names"]

_PLACES = {
    "gsm8k": ("gsm8k_and_math", "Gsm8k"),
    "math": ("gsm8k_and_math", "Math"),
    "humaneval": ("programs", "HumanEval"),
    "mbpp": ("programs", "Mbpp"),
    "mt-bench": ("mtbench", "MtBench"),
    "perplexity": ("perplexity", "PerplexityTask"),
}


def task_names() -> list[str]:
    """All names that `find_task` knows."""
    return [*_PLACES, *(f"glue/{kind}" for kind in GLUE_TASKS)]


def check_task_name(name: str) -> None:
    """Refuse a name that no task has.

    Raises:
        ConfigError: naming all.
    """
    names = task_names()
    if name not in names:
        raise ConfigError(f"no task is called {name!r}; allowed: {', '.join(names)}{did_you_mean(name, names)}")


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none.
    """
    check_task_name(name)
    if name.startswith("glue/"):
        return import_module(".glue", __package__).Understanding(name.removeprefix("glue/"))
    module, kind = _PLACES[name]
    return getattr(import_module(f".{module}", __package__), kind)()
