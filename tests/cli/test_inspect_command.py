"""`pissa inspect` on the command line: one JSON document, one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import exit_code

from pissa.lab.inspection.variants import PUBLISHED
from tiny import CORPUS

# the tiny model's rows are too short for blocks of 64
NF4 = ("--quantize", "nf4", "--block-size", "32")


def test_json_has_a_row_for_each_method_rank_and_norm(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rank", "2", *NF4, "--max-layers", "1", "--json"]
    assert exit_code("inspect", model, *flags) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["norm"]) for r in document["rows"]] == [
        (method, norm) for norm in ("nuclear", "frobenius") for method in PUBLISHED
    ]
    for row in document["rows"]:
        assert {"method", "rank", "by_kind", "mean", "norm", "seconds"} <= row.keys()
        assert row["rank"] == 2
    assert document["double_quant"] is True
    assert document["calibration"] is None


def test_calibration_adds_methods_and_the_held_out_error(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS) * 20)
    flags = ["--rank", "2", *NF4, "--methods", "qlora,ours-1+gptq", "--norm", "frobenius"]
    more = ["--calibration", str(text), "--windows", "10", "--length", "16", "--max-layers", "1", "--json"]
    assert exit_code("inspect", model, *flags, *more) == 0
    document = json.loads(capsys.readouterr().out)
    assert {(r["method"], r["norm"]) for r in document["rows"]} == {
        (method, norm) for norm in ("frobenius", "output") for method in ("qlora", "ours-1+gptq")
    }
    assert document["calibration"]["held_out_windows"] == 2 and document["moments_seconds"] > 0


def test_fewer_bits_cost_more(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors = []
    for bits in ("4", "2"):
        flags = ["--quantize", "gptq", "--block-size", "32", "--bits", bits, "--methods", "qlora,ours-2"]
        assert exit_code("inspect", model, "--rank", "2", *flags, "--norm", "frobenius", "--json") == 0
        plain, ours = json.loads(capsys.readouterr().out)["rows"]
        assert ours["error"] < plain["error"]
        errors.append(plain["error"])
    assert errors == sorted(errors)


def test_without_a_format_the_plain_split_is_shown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("inspect", model, "--rank", "4") == 0
    text = capsys.readouterr().out
    assert "energy in the adapter (%), rank 4" in text
    assert "largest captured-energy loss" in text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rank", "two"], "give a whole number"),
        (["--methods", "ours-5"], "say --quantize"),
        (["--quantize", "nf3"], "--quantize is 'nf3'; allowed: nf4, int8, gptq, nvfp4; did you mean nf4?"),
        ([*NF4, "--methods", "best"], "no quantisation is called 'best'"),
        ([*NF4, "--methods", "ours-1+gptq"], "needs calibration text"),
        ([*NF4, "--norm", "max"], "allowed: nuclear, frobenius"),
        ([*NF4, "--calibration", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--quantize", "nf4"], "not a multiple of block_size 64"),
        (["--rank", "999"], "rank exceeds"),
        (["--target-modules", "nothing_proj"], "no module matches"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], reason: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("inspect", model, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if line.startswith("pissa: ")]
    assert reason in line


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("inspect", "./nowhere") == 2
    assert "./nowhere does not exist" in capsys.readouterr().err


def test_a_rank_budget_is_planned_shown_and_drawn(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rank", "24", "--rank-budget", "9000"]
    assert exit_code("inspect", model, *flags, "--figures", str(tmp_path / "figures"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rank_pattern"]) == 14 and document["parameters"] <= document["budget"] == 9000
    costs = {layer["name"]: sum(layer["shape"]) for layer in document["layers"]}
    assert document["parameters"] == sum(rank * costs[name] for name, rank in document["rank_pattern"].items())
    assert document["uniform_captured"] <= document["captured"] <= document["captured_bound"] <= 100
    shares = [point["captured"] for point in document["curve"]]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(document["captured"])
    assert (tmp_path / "figures" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert exit_code("inspect", model, *flags, *NF4) == 0
    text = capsys.readouterr().out
    assert "squared error of nf4 in the adapters" in text and "q_proj" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank-budget", "10"], "rank_budget is 10; 14 weights at rank 1 take"),
        (["--rank-budget", "9000", "--rank", "4,8"], "rank_budget takes one rank"),
        (["--rank-budget", "9000", "--methods", "qlora", *NF4], "--rank-budget plans for a format"),
    ],
)
def test_a_budget_that_means_nothing_is_refused_in_one_line(
    model: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("inspect", model, *flags) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
