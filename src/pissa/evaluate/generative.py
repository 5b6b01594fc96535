"""Tasks whose samples are texts: each problem is a prompt, each continuation is judged by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..train.data import read_examples
from ..train.prompts import Template, check_template, prompt_text
from ..train.rows import Example, RowError, unusable_rows
from .generate import Continuation, continuations
from .samples import SampleLog
from .task import DEFAULTS, Evaluation, Options, Progress, Task, accuracy


@dataclass(frozen=True)
class Posed:
    """One problem, ready to be put to a model."""

    prompt: str
    """The text that the model continues."""
    facts: dict[str, Any]
    """What its sample is to record beside the continuation, such as the expected answer."""


class GenerativeTask(Task):
    """A task that generates one continuation a problem and judges it right or wrong."""

    @abstractmethod
    def pose(self, problem: Any, tokenizer: Any, template: Template) -> Posed:
        """A problem as a prompt.

        Raises:
            RowError: the problem does not fit the task or the template.
        """

    @abstractmethod
    def judge(self, problem: Any, posed: Posed, generated: str) -> dict[str, Any]:
        """The verdict on a continuation: "correct", and what it rests on."""

    def stops(self, template: Template) -> Sequence[str]:
        """Texts before which a continuation ends, beside the end of sequence."""
        return ()

    def run(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[Any],
        options: Options = DEFAULTS,
        *,
        log: SampleLog | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Generate in batches and judge; see `Task.run`."""
        log = SampleLog() if log is None else log
        template = options.template or self.template
        check_template(template, tokenizer)
        posed = self._posed(problems, tokenizer, template)
        limit = options.max_new_tokens or self.max_new_tokens
        batches = continuations(
            model,
            tokenizer,
            [p.prompt for p in posed],
            max_new_tokens=limit,
            batch_size=options.batch_size,
            add_bos=template != "chat",
            stop=self.stops(template),
            skip=log,
        )
        with closing(batches):
            for indices, written in batches:
                log.add(
                    self._sample(index, problems[index], posed[index], continuation)
                    for index, continuation in zip(indices, written, strict=True)
                    if index not in log
                )
                if progress is not None:
                    progress(len(log), len(posed))
        samples = log.in_order()
        return accuracy(self.metric, samples, self.notes(samples, limit))

    def notes(self, samples: list[dict[str, Any]], limit: int) -> tuple[str, ...]:
        """What a reader of the figure has to know: here, how many continuations were cut at `limit` tokens."""
        unended = sum(not sample["ended"] for sample in samples)
        if not unended:
            return ()
        return (f"{unended} of {len(samples)} continuations were cut at {limit} tokens; --max-new-tokens allows more",)

    def _posed(self, problems: Sequence[Any], tokenizer: Any, template: Template) -> list[Posed]:
        if not problems:
            raise DataError("there are no problems to solve; give at least one")
        posed: list[Posed] = []
        offenders: list[str] = []
        for number, problem in enumerate(problems, 1):
            try:
                posed.append(self.pose(problem, tokenizer, template))
            except RowError as reason:
                offenders.append(f"{where(problem) or f'row {number}'} {reason}")
        if offenders:
            raise unusable_rows("the problems", offenders, len(problems), f"A row of {self.name} is {self.data_format}")
        return posed

    def _sample(self, index: int, problem: Any, posed: Posed, written: Continuation) -> dict[str, Any]:
        facts = {"index": index, "where": where(problem), "prompt": posed.prompt}
        facts |= {"generated": written.text, "ended": written.ended}
        return {**facts, **posed.facts, **self.judge(problem, posed, written.text)}


def where(problem: Any) -> str:
    """The place of a problem's row."""
    return problem["where"] if isinstance(problem, dict) else getattr(problem, "where", "")


def example_prompt(problem: Example, tokenizer: Any, template: Template) -> str:
    """The prompt of a problem that is an example of training data."""
    return prompt_text(problem, tokenizer, template)


def first_examples(data: str | Path, limit: int | None) -> list[Example]:
    """The first examples of a local file; the rows may have any of the shapes of training data."""
    if not Path(data).exists():
        raise DataError(f"there is no file {data}; give a local .jsonl, .json (each also as .gz) or .parquet file")
    return read_examples(Path(data))[:limit]
