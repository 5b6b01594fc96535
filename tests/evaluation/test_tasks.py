"""Tasks give one sample per problem, in order, and go on where they stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa.data.conversation import Example, Message
from pissa.data.prompts import prompt_text
from pissa.data.read import read_examples
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError, DataError
from pissa.evaluation.generate import Continuation, generate
from pissa.evaluation.intervals import wilson
from pissa.evaluation.loss import held_out_loss
from pissa.evaluation.perplexity import perplexity
from pissa.evaluation.samples import SampleLog
from pissa.evaluation.tasks.registry import EvaluationOptions, find_task, task_names
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "How many? " * (i % 4 + 1) + str(i), "answer": f"So.\n#### {i}"} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lively() -> Any:
    """A model of clear preferences, that states answers in no case but writes different texts."""
    model = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def test_every_task_of_the_registry_is_there() -> None:
    for name in task_names():
        task = find_task(name)
        assert task.name == name and task.metric and task.data_format
    with pytest.raises(ConfigError, match="no task is called 'gsm9k'; allowed: gsm8k"):
        find_task("gsm9k")


def test_gsm8k_generates_greedily_and_keeps_a_sample_for_each_problem(problems: Path) -> None:
    task, tokenizer = find_task("gsm8k"), tiny_tokenizer()
    loaded = task.load(problems, limit=5)
    found = task.run(lively(), tokenizer, loaded, EvaluationOptions(batch_size=2, max_new_tokens=6))
    prompts = [prompt_text(problem, tokenizer, "auto") for problem in loaded]
    written = generate(lively(), tokenizer, prompts, batch_size=1, max_new_tokens=6)
    assert [s["generated"] for s in found.samples] == written
    assert [s["index"] for s in found.samples] == [0, 1, 2, 3, 4]
    assert found.samples[2]["where"].endswith("problems.jsonl:3") and found.samples[2]["expected"] == "2"
    assert (found.metric, found.value, found.interval) == ("exact_match", 0.0, wilson(0, 5))


def test_gsm8k_is_the_share_of_right_answers_whatever_marks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = examples_from_rows(
        [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(1, 4)]
        + [{"instruction": "One half?", "output": "The answer is: 1/2"}]
    )
    written = ["#### 2", "The answer is: 5", "no idea", "The answer is: 0.5"]

    def fixed(*_: Any, **__: Any) -> Generator[tuple[list[int], list[Continuation]], None, None]:
        yield [2, 0, 1, 3], [Continuation(written[i], True) for i in (2, 0, 1, 3)]

    monkeypatch.setattr("pissa.evaluation.generate.continuations", fixed)
    found = find_task("gsm8k").run(None, tiny_tokenizer(), problems)
    assert found.value == 0.5
    assert [sample["correct"] for sample in found.samples] == [True, False, False, True]
    assert [sample["expected"] for sample in found.samples] == ["2", "4", "6", "1/2"]
    assert [sample["answer"] for sample in found.samples] == ["2", "5", None, "1/2"]
    assert [sample["generated"] for sample in found.samples] == written
    assert found.notes == ('1 of 4 continuations state no answer as "#### N" or "The answer is: N"',)


@pytest.mark.parametrize("template", ["alpaca", "chat", "none"])
def test_a_problem_is_put_in_the_template_that_is_asked_for(template: Any) -> None:
    tokenizer = tiny_tokenizer()
    problem = Example((Message("user", "1 + 1?"), Message("assistant", "#### 2")))
    found = find_task("gsm8k").run(
        lively(), tokenizer, [problem], EvaluationOptions(template=template, max_new_tokens=2)
    )
    assert found.samples[0]["prompt"] == prompt_text(problem, tokenizer, template)


def test_problems_without_a_reference_answer_are_refused() -> None:
    problems = examples_from_rows([{"question": "1 + 1?", "answer": "#### 2"}, {"question": "?", "answer": "two"}])
    with pytest.raises(DataError, match=r"1 of 2 rows of the problems .*the data: row 2 states no answer"):
        find_task("gsm8k").run(None, tiny_tokenizer(), problems)
    with pytest.raises(DataError, match="no problems"):
        find_task("gsm8k").run(None, tiny_tokenizer(), [])


def test_perplexity_of_a_text_is_that_of_its_windows(tmp_path: Path) -> None:
    text = "How many are left now? " * 40
    (tmp_path / "text.txt").write_text(text)
    task, tokenizer, model = find_task("perplexity"), tiny_tokenizer(), tiny_llama().train()
    found = task.run(model, tokenizer, task.load(tmp_path / "text.txt"), EvaluationOptions(window=30))
    expected = perplexity(model, tokenizer(text)["input_ids"], window=30)
    assert model.training
    assert found.value == pytest.approx(expected.value)
    assert [s["score"] for s in found.samples] == pytest.approx(expected.losses)
    assert found.interval is not None and found.interval[0] <= found.value <= found.interval[1]
    assert not found.higher_is_better
    few = task.run(model, tokenizer, task.load(tmp_path / "text.txt"), EvaluationOptions(window=30, limit=2))
    assert few.samples == found.samples[:2]


def test_perplexity_of_examples_is_that_of_their_responses(problems: Path) -> None:
    task, tokenizer, model = find_task("perplexity"), tiny_tokenizer(), tiny_llama()
    found = task.run(model, tokenizer, task.load(problems), EvaluationOptions(batch_size=3))
    expected = held_out_loss(model, tokenizer, read_examples(problems))
    assert found.value == pytest.approx(math.exp(expected.mean))
    assert [s["tokens"] for s in found.samples] == expected.tokens
    with pytest.raises(DataError, match="larger window"):
        task.run(model, tokenizer, task.load(problems), EvaluationOptions(window=40, template="alpaca"))


@pytest.mark.parametrize("name", ["gsm8k", "perplexity"])
@pytest.mark.parametrize("kept", [0, 1, 3, 6, 7])
def test_a_stopped_evaluation_goes_on_to_identical_samples(
    name: str, kept: int, problems: Path, tmp_path: Path
) -> None:
    task, tokenizer, model, path = find_task(name), tiny_tokenizer(), lively(), tmp_path / "samples.jsonl"
    options = EvaluationOptions(batch_size=3, max_new_tokens=6 if name == "gsm8k" else None)
    whole = task.run(model, tokenizer, task.load(problems), options, log=SampleLog(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + b'{"index": 6, "half')
    again = task.run(model, tokenizer, task.load(problems), options, log=SampleLog(path))
    assert again == whole
    assert sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


def test_what_is_not_a_task_s_data_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1 + 1?", "answer": "two"}\n')
    task = find_task("gsm8k")
    with pytest.raises(DataError, match=r"1 of 1 rows .*bad.jsonl:1 states no answer.*#### N"):
        task.run(lively(), tiny_tokenizer(), task.load(bad))
    with pytest.raises(DataError, match="there is no file"):
        task.load(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        EvaluationOptions(batch_size=0)
