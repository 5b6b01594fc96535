"""Tasks whose samples are texts: each problem is a prompt, each continuation is judged by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.conversation import Example, Message, RowError
from ...data.prompts import Template, prompt_text, resolve_template
from ...data.read import file_rows
from ...data.rows import collect, unusable_rows
from ...errors import DataError
from ..samples import SampleLog
from ..task import Evaluation, EvaluationOptions, Progress, Task, accuracy

if TYPE_CHECKING:
    from ..generate import Continuation


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

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[Any],
        options: EvaluationOptions,
        log: SampleLog,
        progress: Progress | None,
    ) -> Evaluation:
        """Generate in batches and judge."""
        from ..generate import continuations

        template = resolve_template(options.template or self.template, tokenizer)
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
            raise unusable_rows("the problems", offenders, len(problems), self.remedy)
        return posed

    def _sample(self, index: int, problem: Any, posed: Posed, written: Continuation) -> dict[str, Any]:
        facts = {"index": index, "where": where(problem), "prompt": posed.prompt}
        facts |= {"generated": written.text, "ended": written.ended}
        return {**facts, **posed.facts, **self.judge(problem, posed, written.text)}


def where(problem: Any) -> str:
    """The place of a problem's row."""
    return problem["where"] if isinstance(problem, dict) else getattr(problem, "where", "")


def instruction_prompt(text: str, tokenizer: Any, template: Template) -> str:
    """The prompt that asks for a response to one instruction."""
    return prompt_text(Example((Message("user", text), Message("assistant", ""))), tokenizer, template)


def problem_rows(data: str | Path, limit: int | None, keys: Mapping[str, type], remedy: str) -> list[dict[str, Any]]:
    """The first rows of a local file as they are, each with its place as "where".

    Args:
        keys: that every row must have -> of what type.
        remedy: what a row looks like.

    Raises:
        DataError: no such file, no rows, or rows without these keys.
    """
    if not Path(data).is_file():
        raise DataError(f"there is no file {data}; give a local .jsonl, .json (each also as .gz) or .parquet file")
    rows: list[dict[str, Any]] = []
    offenders: list[str] = []
    for where, row in islice(file_rows(Path(data)), limit):
        missing = [key for key, kind in keys.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if isinstance(row, RowError):
            offenders.append(f"{where} {row}")
        elif missing:
            offenders.append(f"{where} has no {', '.join(missing)}")
        else:
            rows.append({**row, "where": where})
    if offenders:
        total = len(rows) + len(offenders)
        raise unusable_rows(str(data), offenders, total, remedy)
    if not rows:
        raise DataError(f"{data} holds no rows. {remedy}")
    return rows


def first_examples(data: str | Path, limit: int | None, renamed: Mapping[str, str] | None = None) -> list[Example]:
    """The first examples of a local file; the rows may have any of the shapes of training data.

    Args:
        renamed: another shape: its keys -> those of one that training data has.
    """
    path = Path(data)
    if not path.is_file():
        raise DataError(f"there is no file {data}; give a local .jsonl, .json (each also as .gz) or .parquet file")
    names = renamed or {}

    def known(row: Any) -> Any:
        if not names or not isinstance(row, dict) or not all(name in row for name in names):
            return row
        return {names[name]: row[name] for name in names}

    return collect(((where, known(row)) for where, row in islice(file_rows(path), limit)), str(data))
