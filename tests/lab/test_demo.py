"""The demo end to end on a tiny model: what it writes, and that a second call repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pissa.data.conversation import Example, Message
from pissa.errors import DataError, OutputError
from pissa.lab.demo import demo
from pissa.lab.demo.arithmetic import make_problems
from tiny import tiny_llama, tiny_tokenizer

RUN_KEYS = {
    "name",
    "method",
    "learning_rate",
    "rank",
    "seed",
    "losses",
    "grad_norms",
    "tokens_per_second",
    "init_seconds",
    "exact_match_before",
    "exact_match_after",
}


EXPORT = {"rank": 8, "max_abs_logit_difference": 0.0, "max_abs_logit": 1.0, "directory": "pissa"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's directory; nobody writes into it."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps at rank 4."""
    plan = demo.Plan(steps=3, batch_size=4, train=24, held_out=4, new_tokens=4, rank=4)
    monkeypatch.setattr(demo, "QUICK", plan)


def test_demo_writes_what_it_promises_and_never_does_it_twice(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    results = demo.run_demo(out, model=model, quick=True)
    shown = capsys.readouterr().err
    for who in ("base", "PiSSA lr 0.0002", "LoRA lr 0.0002", "LoRA lr 0.002"):
        assert f"\n  {who}: " in shown  # an answer of each, as soon as there is one
    listing = {path.name for path in out.iterdir()}
    assert listing == {"demo.json", "results.json", "curves.png", "report.md", "pissa", "lora", "lora-tuned"}
    assert results == json.loads((out / "results.json").read_text())
    assert {"runs", "export", "versions", "hardware"} <= set(results)
    assert [run["name"] for run in results["runs"]] == ["pissa", "lora", "lora-tuned"]
    for run in results["runs"]:
        assert set(run) >= RUN_KEYS
        assert len(run["losses"]) == len(run["grad_norms"]) == 3
    pissa, lora, tuned = results["runs"]
    assert pissa["learning_rate"] == lora["learning_rate"] == tuned["learning_rate"] / 10
    # the same base and the same first batch: the function is preserved at step 0
    assert pissa["losses"][0] == pytest.approx(lora["losses"][0], abs=1e-5)
    assert results["export"]["rank"] == 8
    assert results["export"]["max_abs_logit_difference"] < 1e-4
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "in a fresh process" in (out / "report.md").read_text()
    assert 0 <= results["task"]["base_cut"] <= 4 and results["task"]["new_tokens"] == 4

    monkeypatch.setattr(
        "pissa.training.prepare.adapt", lambda *_, **__: pytest.fail("a finished run was adapted again")
    )
    monkeypatch.setattr(demo, "_check_export", lambda *_: results["export"])
    assert demo.run_demo(out, model=model, quick=True)["runs"] == results["runs"]
    with pytest.raises(OutputError, match="another demo"):
        demo.run_demo(out, model=model, quick=True, seed=1)


def test_a_problem_that_was_learned_is_shown() -> None:
    task = demo.Task("sums", [], [Example((Message("user", "1 +\n1?"), Message("assistant", "2")))] * 3)
    right, wrong = {"correct": True, "generated": "is 2"}, {"correct": False, "generated": "is 3"}
    before = [{"index": index, **sample} for index, sample in enumerate((right, wrong, wrong))]
    after = [{"index": index, **sample} for index, sample in enumerate((right, wrong, right))]
    assert demo._learned(task, before, after) == ["1 + 1?", "is 3 (wrong)", "is 2 (right)"]
    assert demo._learned(task, before, before) == []


def test_demo_trains_and_tests_with_the_same_prompts(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_check_export", lambda *_: EXPORT)
    monkeypatch.setattr(demo, "_arms", lambda: (("pissa", "pissa", 2e-4),))
    monkeypatch.setattr(demo, "demo_report", lambda _: "")
    demo.run_demo(tmp_path / "demo", model=model, quick=True)
    run = tmp_path / "demo" / "pissa"
    assert json.loads((run / "results.json").read_text())["template"] == "chat"
    samples = json.loads((run / "held_out.json").read_text())["samples"]
    assert tiny_tokenizer().chat_template and not any("### Instruction" in sample["prompt"] for sample in samples)


def test_demo_takes_real_data(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # with a fresh process and three arms, which the first test has already
    monkeypatch.setattr(demo, "_check_export", lambda *_: EXPORT)
    monkeypatch.setattr(demo, "_arms", lambda: (("pissa", "pissa", 2e-4),))
    monkeypatch.setattr(demo, "demo_report", lambda _: "")
    rows, _ = make_problems(0, 20, 1)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": r["instruction"], "answer": r["output"]}) + "\n" for r in rows))
    results = demo.run_demo(tmp_path / "demo", model=model, data=str(data), quick=True)
    assert results["task"]["name"] == "rows.jsonl"
    assert results["runs"][0]["exact_match_after_by_template"] is None


def test_demo_refuses_what_it_cannot_use_and_leaves_it_alone(model: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds something else"):
        demo.run_demo(other, model=model, quick=True)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    short = tmp_path / "short.jsonl"
    short.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(DataError, match="has 1 rows; the demo needs 8 or more"):
        demo.run_demo(tmp_path / "demo", model=model, data=str(short), quick=True)
