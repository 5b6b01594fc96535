"""Math problems: a model writes a solution, and the answer that it states is compared with the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.conversation import Example, RowError
from ...data.prompts import Template, prompt_text
from .generative import GenerativeTask, Posed, first_examples
from .gsm8k_answers import extract_answer, same_answer
from .math_answers import final_answer, same_expression


class Gsm8k(GenerativeTask):
    """Problems whose reference ends in "#### N" or "The answer is: N": the numbers must be equal, exactly."""

    name = "gsm8k"
    metric = "exact_match"
    max_new_tokens = 512
    data_format = '{question, answer} (or another shape of training data) whose answer ends in "#### N"'

    def load(self, data: str | Path, limit: int | None = None) -> list[Example]:
        """Rows as training data has them."""
        return first_examples(data, limit)

    def pose(self, problem: Example, tokenizer: Any, template: Template) -> Posed:
        """The question under the template."""
        expected = extract_answer(problem.response)
        if expected is None:
            raise RowError("states no answer")
        return Posed(prompt_text(problem, tokenizer, template), {"expected": str(expected)})

    def judge(self, problem: Example, posed: Posed, generated: str) -> dict[str, Any]:
        """Exact equality of the two last stated answers."""
        answer = extract_answer(generated)
        correct = same_answer(answer, extract_answer(problem.response))
        return {"answer": None if answer is None else str(answer), "correct": correct}

    def notes(self, samples: list[dict[str, Any]], limit: int) -> tuple[str, ...]:
        """Also how many continuations state no answer at all."""
        return (*super().notes(samples, limit), *_unanswered(samples, '"#### N" or "The answer is: N"'))


class Math(GenerativeTask):
    """Problems of the MATH data set (arXiv 2103.03874): the answers, boxed or stated, must be the same expression."""

    name = "math"
    metric = "exact_match"
    max_new_tokens = 1024
    data_format = "MATH's {problem, solution}, or a shape of training data, whose answer is in \\boxed{…}"

    def load(self, data: str | Path, limit: int | None = None) -> list[Example]:
        """MATH's own rows, or rows as training data has them."""
        return first_examples(data, limit, renamed={"problem": "question", "solution": "answer"})

    def pose(self, problem: Example, tokenizer: Any, template: Template) -> Posed:
        """The problem under the template."""
        expected = final_answer(problem.response)
        if expected is None:
            raise RowError("states no answer")
        return Posed(prompt_text(problem, tokenizer, template), {"expected": expected})

    def judge(self, problem: Example, posed: Posed, generated: str) -> dict[str, Any]:
        """Sameness as `boxed.py` has it."""
        answer = final_answer(generated)
        return {"answer": answer, "correct": same_expression(answer, posed.facts["expected"])}

    def notes(self, samples: list[dict[str, Any]], limit: int) -> tuple[str, ...]:
        """Also how many continuations state no answer at all."""
        return (*super().notes(samples, limit), *_unanswered(samples, '"\\boxed{…}" or "The answer is: …"'))


def _unanswered(samples: list[dict[str, Any]], wanted: str) -> tuple[str, ...]:
    silent = sum(sample["answer"] is None for sample in samples)
    return (f"{silent} of {len(samples)} continuations state no answer as {wanted}",) if silent else ()
