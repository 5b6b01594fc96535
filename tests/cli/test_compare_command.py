"""`pissa compare`: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import exit_code

from tiny import tiny_llama, tiny_tokenizer


def test_the_printed_loss_is_the_mean_over_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Say {i}.", "output": "x" * (1 + 7 * (i % 3))} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = ["compare", "--model", str(tmp_path / "model"), "--data", str(data), "--out", str(out)]
    arguments += ["--methods", "lora", "--lrs", "1e-3", "--steps", "1", "--seeds", "1", "--no-null", "--no-report"]
    arguments += [
        "--rank",
        "2",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "2",
        "--template",
        "none",
        "--dtype",
        "fp32",
        "--curve-points",
        "0",
    ]
    assert exit_code(*arguments) == 0
    (run,) = json.loads((out / "results.json").read_text())["methods"]["lora"]["runs"]
    trial = json.loads((out / "runs" / "lora" / "seed-0" / "trial.json").read_text())
    assert len(set(trial["test_tokens"])) > 1
    mean = sum(run["test_losses"]) / len(run["test_losses"])
    assert f"lora: test loss {mean:.4f} over 1 runs at lr 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lrs", "1e-4,1e-3", "--budget", "500"], "--budget and --search-runs are of --lrs auto"),
        (["--lrs", "1e-4", "--search-runs", "4"], "--budget and --search-runs are of --lrs auto"),
        (["--budget", "500", "--search-runs", "4"], "say the same; give one of them"),
        (["--lrs", "fast"], "learning rates 'fast'; give auto, or positive numbers"),
        (["--methods", "nosuch"], "no such method: nosuch"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert exit_code("compare", "--model", "M", "--data", "D", "--out", str(out), *arguments) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.out == "" and printed.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "3"], "--steps"),
        (["--lrs", "auto"], "--lrs"),
        (["--no-null", "--keep-runs", "--eval", "gsm8k"], "--no-null, --eval, --keep-runs"),
        (["--model", "M", "--data", "D"], "--model, --data"),
    ],
)
def test_rebuild_refuses_what_it_would_ignore(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("compare", "--rebuild", "--out", str(tmp_path / "out"), "--no-report", "--json", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.rstrip().endswith(f"leave out {named}")
    assert list(tmp_path.iterdir()) == []


def test_rebuild_takes_its_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("compare", "--rebuild", "--out", str(tmp_path), "--no-report", "--json") == 2
    assert "--rebuild measures nothing" not in capsys.readouterr().err  # it is the directory that is no comparison's
