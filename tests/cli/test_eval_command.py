"""`pissa eval`: figures, one JSON document, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import exit_code


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(4)))
    return str(path)


def test_a_figure_with_its_interval_or_one_json_document(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", model, "--task", "gsm8k", "--data", data, "--limit", "3", "--max-new-tokens", "4"]
    assert exit_code(*arguments, "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "gsm8k: exact_match 0.0 %, 0 of 3 (95 % interval 0.0 % to 56.2 %)" in text
    assert "3 of 3 continuations state no answer" in text and "in template 'chat'" in text
    assert exit_code(*arguments, "--out", str(tmp_path / "out"), "--json") == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["count"] == 3 and document["settings"]["limit"] == 3
    assert "finished already" in " ".join(printed.err.split())
    assert exit_code("eval", model, "--task", "perplexity", "--data", data) == 0
    assert "perplexity: perplexity " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "gsm9k", "--data", "D"], "no task is called 'gsm9k'; allowed: gsm8k, math, humaneval, mbpp"),
        (
            ["--task", "glue/sst3", "--data", "D"],
            "allowed: gsm8k, math, humaneval, mbpp, mt-bench, perplexity, glue/cola",
        ),
        (["--task", "gsm8k", "--data", "none.jsonl"], "there is no file none.jsonl"),
        (["--task", "humaneval", "--data", "DATA"], "nothing was run. Add --allow-code-execution"),
        (["--task", "mt-bench", "--data", "DATA"], "needs a judge: give --judge-url"),
        (["--task", "gsm8k", "--data", "DATA", "--window", "5"], "gsm8k has no use for window"),
        (["--task", "gsm8k", "--data", "DATA", "--limit", "0"], "--limit is 0; give a whole number of at least 1"),
        (
            ["--task", "gsm8k", "--data", "DATA", "--template", "alpacca"],
            "template is 'alpacca'; allowed: auto, chat, alpaca",
        ),
        (
            ["--task", "mbpp", "--data", "DATA", "--allow-code-execution", "--allow-unconfined-code"],
            "has no task_id, test_list",
        ),
        (["--task", "gsm8k"], "Missing option '--data'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], complaint: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [data if argument == "DATA" else argument for argument in arguments]
    assert exit_code("eval", model, *given, "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.out == ""
    assert printed.err.startswith("pissa: ") and printed.err.count("\n") == 1
    assert not out.exists()


def test_a_model_that_is_not_there_leaves_no_record(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert exit_code("eval", "/no/such/model", "--task", "gsm8k", "--data", data, "--out", str(out)) == 2
    assert "/no/such/model does not exist" in capsys.readouterr().err
    assert not out.exists()
