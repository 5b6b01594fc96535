"""MT-Bench against a fake endpoint on this machine: what it is asked, how it fails, what is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa.data.conversation import Example, Message
from pissa.data.prompts import prompt_text
from pissa.errors import ConfigError, DataError
from pissa.evaluation.generate import generate
from pissa.evaluation.run import evaluate
from pissa.evaluation.samples import SampleLog
from pissa.evaluation.task import EvaluationOptions
from pissa.evaluation.tasks.judge import Judge, rating_of
from pissa.evaluation.tasks.mtbench import conversation_prompt
from pissa.evaluation.tasks.registry import find_task
from tiny import tiny_llama, tiny_tokenizer


class Endpoint:
    """An endpoint that answers from a list, the last answer for ever: (status, body or text of a completion)."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, str]] = [(200, "Fine. Rating: [[7]]")]
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.asked.append(json.loads(body))
                endpoint.headers.append({**dict(self.headers), "path": self.path})
                status, text = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                completion = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = json.dumps(completion).encode() if status == 200 else text.encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write {this}.", "Shorter."]},
        {"question_id": 111, "category": "math", "turns": ["How many?", "And now?"]},
        {"question_id": 82, "category": "roleplay", "turns": ["Who are you?", "Why?"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {"question_id": 111, "choices": [{"index": 0, "turns": ["Twelve.", "Thirteen."]}]}
    (tmp_path / "references.jsonl").write_text(json.dumps(answers) + "\n")
    return path


def options(endpoint: Endpoint, questions: Path, **more: Any) -> EvaluationOptions:
    settings = {
        "references": str(questions.with_name("references.jsonl")),
        "batch_size": 2,
        "max_new_tokens": 5,
        **more,
    }
    return EvaluationOptions(judge_url=endpoint.url, judge_model="grader", **settings)


def lively() -> Any:
    model = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def test_both_turns_are_generated_and_judged(endpoint: Endpoint, questions: Path) -> None:
    task, tokenizer, model = find_task("mt-bench"), tiny_tokenizer(), lively()
    endpoint.answers = [
        (200, "ready"),
        *((200, f"So so. Rating: [[{n}]]") for n in (8, 6, 4, 2)),
        (200, "Hm, [[9.5]]."),
    ]
    found = task.run(model, tokenizer, task.load(questions), options(endpoint, questions))
    assert [sample["question_id"] for sample in found.samples] == [81, 111, 82]
    for sample, turns in zip(found.samples, (["Write {this}.", "Shorter."], ["How many?", "And now?"]), strict=False):
        first = conversation_prompt(turns[:1], [], tokenizer, "chat")
        assert sample["answers"][0] == generate(model, tokenizer, [first], max_new_tokens=5, batch_size=1)[0]
        second = conversation_prompt(turns, sample["answers"][:1], tokenizer, "chat")
        assert sample["answers"][1] == generate(model, tokenizer, [second], max_new_tokens=5, batch_size=1)[0]
    ratings = [judgement["rating"] for sample in found.samples for judgement in sample["judgements"]]
    assert sorted(ratings) == [2, 4, 6, 8, 9.5, 9.5]
    assert found.value == pytest.approx(sum(ratings) / 6)
    assert found.samples[0]["score"] == pytest.approx(sum(ratings[:2]) / 2)
    assert found.others["first turn"] == pytest.approx(sum(ratings[::2]) / 3)
    assert len(endpoint.asked) == 7
    of_math = [json.dumps(ask["messages"]) for ask in endpoint.asked if "Twelve." in json.dumps(ask)]
    assert len(of_math) == 2 and "Thirteen." in of_math[1] and "How many?" in of_math[0]
    assert all(ask["model"] == "grader" and ask["temperature"] == 0 for ask in endpoint.asked)
    assert all(headers["path"] == "/v1/chat/completions" for headers in endpoint.headers)
    assert "cut at 5 tokens" in " ".join(found.notes) and "FastChat" in " ".join(found.notes)


def test_what_was_judged_is_not_judged_again(endpoint: Endpoint, questions: Path, tmp_path: Path) -> None:
    task, tokenizer, model, path = find_task("mt-bench"), tiny_tokenizer(), lively(), tmp_path / "samples.jsonl"
    whole = task.run(model, tokenizer, task.load(questions), options(endpoint, questions), log=SampleLog(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    count = len(endpoint.asked)
    again = task.run(model, tokenizer, task.load(questions), options(endpoint, questions), log=SampleLog(path))
    assert again == whole and len(endpoint.asked) == count + 5
    task.run(model, tokenizer, task.load(questions), options(endpoint, questions), log=SampleLog(path))
    assert len(endpoint.asked) == count + 5


def test_the_key_is_sent_and_kept_nowhere(
    endpoint: Endpoint, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    chosen = options(endpoint, questions, judge_key_env="MY_KEY", limit=1)
    results = evaluate(str(tmp_path / "model"), "mt-bench", questions, tmp_path / "out", chosen)
    assert results["value"] == 7.0 and results["settings"]["judge_model"] == "grader"
    assert all(headers["Authorization"] == "Bearer sk-secret" for headers in endpoint.headers)
    assert not any("sk-secret" in path.read_text() for path in (tmp_path / "out").iterdir())
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="environment has no MY_KEY"):
        Judge(endpoint.url, "grader", "MY_KEY")


def test_passing_failures_are_tried_again(endpoint: Endpoint) -> None:
    waits: list[float] = []
    endpoint.answers = [(503, "busy"), (429, "slow down"), (200, "")]
    assert Judge(endpoint.url, "grader").ask("", "Hello", sleep=waits.append) == ""
    assert waits == [1.0, 2.0]
    endpoint.answers = [(500, "broken")]
    with pytest.raises(ConfigError, match=r"gave no answer in 3 tries \(last: HTTP 500 broken\).*goes on where it was"):
        Judge(endpoint.url, "grader", tries=3).ask("", "Hello", sleep=waits.append)
    with pytest.raises(ConfigError, match=r"in 2 tries \(last: ClientConnectorError"):
        Judge("http://127.0.0.1:9/v1", "grader", tries=2).ask("", "Hello", sleep=waits.append)


def test_a_refusal_is_one_clear_error_at_once(endpoint: Endpoint, questions: Path) -> None:
    endpoint.answers = [(401, '{"error": "bad key"}')]
    task = find_task("mt-bench")
    with pytest.raises(ConfigError, match=r"refuses model 'grader': HTTP 401 .*bad key.*check --judge-url"):
        task.run(lively(), tiny_tokenizer(), task.load(questions), options(endpoint, questions))
    assert len(endpoint.asked) == 1


def test_judgements_without_a_rating_are_kept_and_said(endpoint: Endpoint, questions: Path) -> None:
    task, tokenizer, model = find_task("mt-bench"), tiny_tokenizer(), lively()
    endpoint.answers = [(200, "ready"), (200, "I will not say."), (200, "Rating: [[3]]")]
    found = task.run(model, tokenizer, task.load(questions), options(endpoint, questions))
    assert found.value == 3.0
    assert "1 of 6 judgements give no rating" in found.notes[0]
    assert "I will not say." in json.dumps(found.samples)
    endpoint.answers = [(200, "no")]
    with pytest.raises(ConfigError, match="rated nothing"):
        task.run(model, tokenizer, task.load(questions), options(endpoint, questions))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("[[ 7.5 ]]", 7.5),
        ("Rating: [5]", 5),
        ("[[11]]", None),
        ("[[0]]", None),
        ("5", None),
        ("", None),
    ],
)
def test_ratings_are_read(text: str, rating: float | None) -> None:
    assert rating_of(text) == rating


def test_instructions_of_fastchat_s_format_are_taken(endpoint: Endpoint, questions: Path, tmp_path: Path) -> None:
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    rows = [
        {"name": n, "system_prompt": f"Sys {n}", "prompt_template": "Rate this" + " {answer_2}" * ("multi" in n)}
        for n in names
    ]
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task("mt-bench")
    chosen = options(endpoint, questions, judge_prompts=str(path))
    task.run(lively(), tiny_tokenizer(), task.load(questions), chosen)
    systems = {ask["messages"][0]["content"] for ask in endpoint.asked[1:]}
    assert systems == {f"Sys {name}" for name in names}
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no prompts named single-math-v1"):
        task.run(lively(), tiny_tokenizer(), task.load(questions), chosen)


def test_what_is_missing_is_named_before_the_work(endpoint: Endpoint, questions: Path) -> None:
    task = find_task("mt-bench")
    with pytest.raises(ConfigError, match="needs a judge: give --judge-url"):
        task.check(EvaluationOptions())
    with pytest.raises(ConfigError, match=r"grader\.example"):
        Judge("grader.example", "m")
    with pytest.raises(DataError, match=r"1 questions of math.*give --references"):
        task.run(lively(), tiny_tokenizer(), task.load(questions), options(endpoint, questions, references=None))
    assert endpoint.asked == []


def test_second_turns_follow_the_template() -> None:
    tokenizer = tiny_tokenizer()
    example = Example(
        (Message("user", "A?"), Message("assistant", "b"), Message("user", "C?"), Message("assistant", "-"))
    )
    assert conversation_prompt(["A?", "C?"], ["b"], tokenizer, "chat") == prompt_text(example, tokenizer, "chat")
    alpaca = conversation_prompt(["A?", "C?"], ["b"], tokenizer, "alpaca")
    assert alpaca.endswith("### Instruction:\nA?\n\n### Response:b\n\n### Instruction:\nC?\n\n### Response:")
    assert conversation_prompt(["A?", "C?"], ["b"], tokenizer, "none") == "A?b\n\nC?"


def test_the_published_questions_are_read(pissa_data: Path) -> None:
    assert len(find_task("mt-bench").load(pissa_data / "mt_bench" / "question.jsonl.gz")) == 80


@pytest.mark.parametrize(
    "field", ["{question.__class__}", "{question:>9999999999}", "{question!r}", "{0}", "{}", "{x", "{other}"]
)
def test_a_template_has_plain_names_alone(endpoint: Endpoint, questions: Path, tmp_path: Path, field: str) -> None:
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    path = tmp_path / "judge_prompts.jsonl"
    rows = [{"name": name, "system_prompt": "Sys", "prompt_template": f"Rate {field}"} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task("mt-bench")
    with pytest.raises(DataError, match="prompt_template"):
        task.run(
            lively(), tiny_tokenizer(), task.load(questions), options(endpoint, questions, judge_prompts=str(path))
        )
