"""MT-Bench (arXiv 2306.05685): questions of two turns, answered by a model and rated from 1 to 10 by another one.

Both turns are generated greedily, so that an evaluation can be repeated; the published ones draw at a temperature by
category. The judge is asked once per turn, with the instructions below, or those of a file in FastChat's format
(judge_prompts.jsonl), which published figures rest on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from ...data.prompts import ALPACA, Template, resolve_template
from ...errors import ConfigError, DataError, listed
from ...outside.templates import TemplateRefusedError, apply_template
from ..intervals import bootstrap
from ..samples import SampleLog
from ..task import Evaluation, EvaluationOptions, Progress, Task
from .generative import instruction_prompt, problem_rows
from .judge import Judge, rating_of

if TYPE_CHECKING:
    from ..generate import Continuation

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose answers are judged against a reference."""
REFERENCE = "A row of reference answers is MT-Bench's {question_id, choices: [{turns}]}"
RATE = (
    "Think it over in a few sentences, be fair, and do not be swayed by length. End with the rating, a whole number "
    "from 1 (useless) to 10 (excellent), in double square brackets, like this: Rating: [[7]]"
)
ONE = "[Question]\n{question}\n[End of question]\n\n"
TWO = "[User]\n{question_1}\n\n[Assistant]\n{answer_1}\n\n[User]\n{question_2}\n\n[Assistant]\n{answer_2}\n[End]"
JUDGE_PROMPTS = {
    "single-v1": {
        "system_prompt": "You grade the answers of AI assistants.",
        "prompt_template": "Grade how helpful, relevant, correct, deep and creative this answer to a user is. "
        f"{RATE}\n\n{ONE}[Answer]\n{{answer}}\n[End of answer]",
    },
    "single-math-v1": {
        "system_prompt": "You grade the answers of AI assistants.",
        "prompt_template": "Grade how correct and helpful this answer to a user is. First hold it against the "
        f"reference and point out mistakes. {RATE}\n\n{ONE}[Reference]\n{{ref_answer_1}}\n[End of reference]\n\n"
        "[Answer]\n{answer}\n[End of answer]",
    },
    "single-v1-multi-turn": {
        "system_prompt": "You grade the answers of AI assistants. In the conversation that follows, grade the answer "
        f"to the user's second message: how helpful, relevant, correct, deep and creative it is. {RATE}",
        "prompt_template": TWO,
    },
    "single-math-v1-multi-turn": {
        "system_prompt": "You grade the answers of AI assistants. In the conversation that follows, grade how correct "
        f"and helpful the answer to the user's second message is. First hold it against the reference. {RATE}",
        "prompt_template": "[References]\n{ref_answer_1}\n\n{ref_answer_2}\n[End of references]\n\n" + TWO,
    },
}
"""Name -> system prompt and template, under FastChat's names."""


FIELDS = (
    "question", "answer", "question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2",
)  # fmt: skip
"""What a template may name."""


class MtBench(Task):
    """Two turns a question, each rated by a judge."""

    name = "mt-bench"
    metric = "rating"
    max_new_tokens = 1024
    data_format = "MT-Bench's {question_id, category, turns}"
    settings = (*Task.settings, "judge_url", "judge_model", "judge_key_env", "judge_prompts", "references")

    def check(self, options: EvaluationOptions) -> None:
        """Also that there is a judge."""
        super().check(options)
        if not options.judge_url or not options.judge_model:
            raise ConfigError(
                "mt-bench needs a judge: give --judge-url (any endpoint that speaks OpenAI's chat completions), "
                "--judge-model and, where it asks for a key, --judge-key-env with the name of the variable that has it"
            )

    def load(self, data: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of question.jsonl."""
        rows = problem_rows(data, limit, {"question_id": int, "category": str, "turns": list}, self.remedy)
        odd = [
            row["where"] for row in rows if len(row["turns"]) != 2 or not all(isinstance(t, str) for t in row["turns"])
        ]
        if odd:
            raise DataError(f"{listed(odd)}: a question of mt-bench has two turns, both text")
        return rows

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[dict[str, Any]],
        options: EvaluationOptions,
        log: SampleLog,
        progress: Progress | None,
    ) -> Evaluation:
        """Answer and judge. The judge is tried before the work begins."""
        template = resolve_template(options.template or self.template, tokenizer)
        judge = Judge(str(options.judge_url), str(options.judge_model), options.judge_key_env)
        prompts = _judge_prompts(options.judge_prompts)
        references = _references(options.references, problems)
        if len(log) < len(problems):
            judge.ask("", "Answer with the word ready.")
        for index, written in self._answered(model, tokenizer, problems, options, template, log):
            answers = [turn.text for turn in written]
            row = problems[index]
            facts = {"index": index, "where": row["where"], "question_id": row["question_id"]}
            facts |= {"category": row["category"], "answers": answers, "ended": [turn.ended for turn in written]}
            log.add([{**facts, **_judged(judge, prompts, row, answers, references.get(row["question_id"]))}])
            if progress is not None:
                progress(len(log), len(problems))
        return self._evaluation(log.in_order(), options)

    def _answered(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Any],
        options: EvaluationOptions,
        template: Template,
        log: SampleLog,
    ) -> Iterator[tuple[int, list[Continuation]]]:
        """Both turns of every question that is not in the log, batch by batch."""
        from ..generate import continuations

        settings: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens or self.max_new_tokens,
            "batch_size": options.batch_size,
            "add_bos": template != "chat",
        }
        firsts = [conversation_prompt(row["turns"][:1], [], tokenizer, template) for row in rows]
        with closing(continuations(model, tokenizer, firsts, skip=log, **settings)) as batches:
            for indices, first in batches:
                prompts = [
                    conversation_prompt(rows[index]["turns"], [turn.text], tokenizer, template)
                    for index, turn in zip(indices, first, strict=True)
                ]
                (second_batch,) = [
                    *continuations(model, tokenizer, prompts, **{**settings, "batch_size": len(prompts)})
                ]
                second = dict(zip(*second_batch, strict=True))
                for place, index in enumerate(indices):
                    if index not in log:
                        yield index, [first[place], second[place]]

    def _evaluation(self, samples: list[dict[str, Any]], options: EvaluationOptions) -> Evaluation:
        def mean(rows: Sequence[dict[str, Any]], turn: int | None = None) -> float:
            given = [j["rating"] for row in rows for j in row["judgements"] if turn in (None, j["turn"])]
            given = [rating for rating in given if rating is not None]
            return statistics.fmean(given) if given else float("nan")

        silent = sum(j["rating"] is None for row in samples for j in row["judgements"])
        cut = sum(not all(row["ended"]) for row in samples)
        notes = []
        if silent:
            notes.append(f"{silent} of {2 * len(samples)} judgements give no rating [[N]] and do not count")
        if cut:
            limit = options.max_new_tokens or self.max_new_tokens
            notes.append(f"{cut} of {len(samples)} answers were cut at {limit} tokens; --max-new-tokens allows more")
        if options.judge_prompts is None:
            notes.append(
                "judged by pissa's own instructions; published figures rest on FastChat's: --judge-prompts FILE"
            )
        if silent == 2 * len(samples):
            raise ConfigError(
                f"the judge {options.judge_model!r} rated nothing: none of its {silent} judgements has a rating [[N]]; "
                "choose another judge, and another --out"
            )
        others = {name: mean(samples, turn) for name, turn in (("first turn", 1), ("second turn", 2))}
        others = {name: value for name, value in others.items() if value == value}
        return Evaluation("rating", mean(samples), bootstrap(samples, mean), samples, others=others, notes=tuple(notes))


def conversation_prompt(asked: Sequence[str], answers: Sequence[str], tokenizer: Any, template: Template) -> str:
    """The text after which a model gives its next answer; Alpaca's prompt goes on with its own headings."""
    if template == "chat":
        turns = [{"role": "user", "content": asked[0]}]
        for answer, question in zip(answers, asked[1:], strict=True):
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        try:
            return apply_template(tokenizer, turns, tokenize=False, add_generation_prompt=True)
        except TemplateRefusedError as error:
            raise DataError(f"a question is refused by the tokenizer's chat template ({error})") from error
    text = instruction_prompt(asked[0], tokenizer, template)
    heading = ALPACA[ALPACA.index("### Instruction:") :] if template == "alpaca" else "{instruction}"
    for answer, question in zip(answers, asked[1:], strict=True):
        text += f"{answer}\n\n{heading.format(instruction=question)}"
    return text


def _judged(
    judge: Judge, prompts: dict[str, Any], row: dict[str, Any], answers: list[str], reference: list[str] | None
) -> dict[str, Any]:
    """Both turns' judgements as they were given, and the mean of their ratings."""
    fields: dict[str, str] = {"question": row["turns"][0], "answer": answers[0]}
    fields |= {f"question_{i}": text for i, text in enumerate(row["turns"], 1)}
    fields |= {f"answer_{i}": text for i, text in enumerate(answers, 1)}
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference or [], 1)}
    kind = "single-math-v1" if reference else "single-v1"
    judgements = []
    for turn, name in ((1, kind), (2, f"{kind}-multi-turn")):
        said = judge.ask(prompts[name]["system_prompt"], prompts[name]["prompt_template"].format(**fields))
        judgements.append({"turn": turn, "prompt": name, "judgement": said, "rating": rating_of(said)})
    given = [j["rating"] for j in judgements if j["rating"] is not None]
    return {"judgements": judgements, "score": statistics.fmean(given) if given else None}


def _judge_prompts(path: str | None) -> dict[str, Any]:
    if path is None:
        return JUDGE_PROMPTS
    keys = {"name": str, "system_prompt": str, "prompt_template": str}
    rows = {
        row["name"]: row
        for row in problem_rows(path, None, keys, "A row is FastChat's {name, system_prompt, prompt_template}")
    }
    missing = [name for name in JUDGE_PROMPTS if name not in rows]
    if missing:
        raise DataError(f"{path} has no prompts named {', '.join(missing)}; give FastChat's judge_prompts.jsonl")
    for name in JUDGE_PROMPTS:
        _check_fields(rows[name])
    return rows


def _check_fields(row: dict[str, Any]) -> None:
    """Refuse a template with more in it than plain names: a format could ask for gigabytes, or look into objects.

    Raises:
        DataError: naming the field.
    """
    try:
        parts = Formatter().parse(row["prompt_template"])
        fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    except ValueError as error:
        raise DataError(f"{row['where']}: the prompt_template is no template ({error}); give FastChat's") from error
    odd = [name for name, spec, conversion in fields if name not in FIELDS or spec or conversion]
    if odd:
        raise DataError(
            f"{row['where']}: the prompt_template has the field {odd[0][:80]!r}; allowed, without a format: "
            f"{', '.join(FIELDS)}"
        )


def _references(path: str | None, problems: Sequence[dict[str, Any]]) -> dict[int, list[str]]:
    """Question id -> reference answers, of the categories that are judged against them."""
    needed = [row["question_id"] for row in problems if row["category"] in WITH_REFERENCE]
    if not needed:
        return {}
    if path is None:
        raise DataError(
            f"{len(needed)} questions of math, reasoning and coding are judged against reference answers; give "
            "--references with MT-Bench's reference answers (.jsonl), or --limit to questions before them"
        )
    found = {
        row["question_id"]: row["choices"]
        for row in problem_rows(path, None, {"question_id": int, "choices": list}, REFERENCE)
    }
    try:
        return {number: list(found[number][0]["turns"]) for number in needed}
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} has no reference answer, with choices and turns, to question {error}") from error
