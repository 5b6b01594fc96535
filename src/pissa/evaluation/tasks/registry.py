"""The tasks by name.

task = find_task("gsm8k")
problems = task.load("test.jsonl", limit=100)
evaluation = task.run(model, tokenizer, problems)       # .metric .value .interval .samples
"""

from __future__ import annotations

from importlib import import_module

from ...errors import ConfigError
from ..task import Evaluation, Options, Task
from .glue import GLUE_TASKS, Understanding

__all__ = ["Evaluation", "Options", "Task", "find_task", "task_names"]

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


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none.
    """
    if name.startswith("glue/"):
        return Understanding(name.removeprefix("glue/"))
    if name not in _PLACES:
        raise ConfigError(f"no task is called {name!r}; allowed: {', '.join(task_names())}")
    module, kind = _PLACES[name]
    return getattr(import_module(f".{module}", __package__), kind)()
