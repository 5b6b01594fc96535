"""A comparison end to end on a tiny model: what it writes, that it goes on where it stopped, and its budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import ConfigError, DataError, MissingExtraError, OutputError
from pissa.evaluation.sandbox import Verdict
from pissa.evaluation.task import Evaluation, accuracy
from pissa.lab.comparison import run as comparison
from pissa.lab.comparison.page import page_of
from pissa.lab.comparison.plan import ComparisonPlan
from pissa.lab.comparison.run import compare, rebuild
from pissa.lab.comparison.trial import KEPT, TRIAL
from pissa.training.recipe import QUANTIZED_METHODS, Recipe
from tiny import tiny_llama, tiny_tokenizer

RECIPE = Recipe(rank=2, batch_size=2, micro_batch_size=2, dtype="fp32", template="none", max_length=64)
RUN_KEYS = {
    "seed", "status", "learning_rate", "losses", "grad_norms", "validation_loss", "test_loss", "test_losses",
    "test_correct", "during", "perplexity_before", "perplexity_after", "seconds", "init_seconds", "peak_memory_gib",
    "trainable_parameters", "tokens_per_second",
}  # fmt: skip


def rows(count: int) -> list[dict[str, str]]:
    """Additions with their answers, all different."""
    return [{"instruction": f"Add {i} and {2 * i}.", "output": f"The answer is: {3 * i}"} for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's directory."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty rows."""
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", 60)


def write(path: Path, count: int) -> str:
    """So many rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return str(path)


def plan(**settings: Any) -> ComparisonPlan:
    """Two steps, one seed."""
    usual: dict[str, Any] = {
        "methods": ("lora", "pissa"),
        "recipe": RECIPE,
        "steps": 2,
        "seeds": 1,
        "rates": (1e-3,),
        "null": False,
        "validation_rows": 3,
        "test_rows": 4,
        "accuracy_problems": 0,
        "curve_points": 0,
    }
    return ComparisonPlan(**{**usual, **settings})


@pytest.fixture(scope="module")
def whole(model: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of pissa and full, one run each; nobody writes into it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    made(model, data, out, plan(methods=("pissa", "full")), quiet=True)
    return out


def made(*arguments: Any, **options: Any) -> dict[str, Any]:
    """A comparison's results, without its report."""
    return compare(*arguments, report=False, **options)


def made_again(out: Path) -> dict[str, Any]:
    """Results from the directories, without the report."""
    return rebuild(out, report=False)


def test_a_comparison_holds_everything_and_is_made_again_from_its_directories(
    model: str, data: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How many are left now? " * 20)
    out = tmp_path / "out"
    chosen = plan(
        methods=("pissa",), rates=None, search_runs=3, rungs=1, steps=4, null=True, accuracy_problems=2, new_tokens=2,
        curve_points=2, forgetting=str(text),
    )  # fmt: skip
    results = made(model, data, out, chosen, command="pissa compare", quiet=True)
    assert {path.name for path in out.iterdir()} == {
        "compare.json", "base.json", "search", "runs", "null", "results.json",
    }  # fmt: skip
    assert results == json.loads((out / "results.json").read_text())
    parts = {name: results["task"][name] for name in ("train_rows", "validation_rows", "test_rows")}
    assert parts == {"train_rows": 53, "validation_rows": 3, "test_rows": 4}
    assert results["command"] == "pissa compare"
    assert {"settings", "versions", "hardware"} <= set(results)
    for name, method in results["methods"].items():
        assert [trial["steps"] for trial in method["trials"]] == [2, 2, 2]
        assert {trial["status"] for trial in method["trials"]} == {"done"}
        best = min(method["trials"], key=lambda trial: trial["validation_loss"])
        assert method["learning_rate"] == best["learning_rate"]
        (run,) = method["runs"]
        assert set(run) == RUN_KEYS
        assert run["learning_rate"] == best["learning_rate"]
        assert len(run["losses"]) == len(run["grad_norms"]) == 4
        assert [point["step"] for point in run["during"]] == [2, 4]
        assert run["test_loss"] == pytest.approx(sum(run["test_losses"]) / 4)
        # the last measurement while training is of the model that is tested, here on all test problems
        assert run["during"][-1]["loss"] == pytest.approx(run["test_loss"], abs=1e-5), name
        assert len(run["test_losses"]) == 4
        assert len(run["test_correct"]) == 2
        assert run["perplexity_before"] == results["base"]["perplexity"] != run["perplexity_after"]
        assert run["seconds"] > 0
    assert results["null"]["method"] == "pissa"
    assert [run["seed"] for run in results["null"]["runs"]] == [500]
    trial = out / "runs" / "pissa" / "seed-0"
    assert {str(path.relative_to(trial)) for path in trial.rglob("*") if path.is_file()} == set(KEPT)

    (out / "results.json").unlink()
    assert made_again(out) == results


def test_what_is_done_is_not_done_again_and_a_stopped_comparison_ends_the_same(
    whole: Path, model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    once, chosen = comparison.run_trial, plan(methods=("pissa", "full"))
    monkeypatch.setattr(comparison, "run_trial", _stops_after(1, once))
    with pytest.raises(KeyboardInterrupt, match="all finished runs are saved"):
        made(model, data, out, chosen, quiet=True)
    assert [len(method["runs"]) for method in made_again(out)["methods"].values()] == [1, 0]
    monkeypatch.setattr(comparison, "run_trial", once)
    again = made(model, data, out, chosen, quiet=True)
    assert _numbers(again) == _numbers(read(whole))
    # the same base and the same batches: the function is preserved at step 0
    pissa, full = (again["methods"][name]["runs"][0] for name in ("pissa", "full"))
    assert pissa["losses"][0] == pytest.approx(full["losses"][0], abs=1e-5)
    monkeypatch.setattr(comparison, "run_trial", _stops_after(0, once))
    assert made(model, data, out, chosen, quiet=True) == again


def test_a_run_killed_before_it_was_scored_is_scored_from_its_directory(
    whole: Path, model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, methods = tmp_path / "killed", ("pissa", "full")
    with monkeypatch.context() as patched:
        patched.setattr("pissa.lab.comparison.trial._scores", _killed)
        for _ in methods:
            with pytest.raises(KeyboardInterrupt):
                made(model, data, out, plan(methods=methods), quiet=True)
    again = made(model, data, out, plan(methods=methods), quiet=True)
    for name in methods:
        before, after = (found["methods"][name]["runs"][0] for found in (read(whole), again))
        assert after["losses"] == before["losses"]
        assert after["test_losses"] == pytest.approx(before["test_losses"], abs=1e-5)


def test_more_seeds_and_methods_go_on_with_what_is_there(
    whole: Path, model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    labels: list[str] = []
    once = comparison.run_trial

    def counted(trial: Any, *arguments: Any, **options: Any) -> Any:
        labels.append(trial.label)
        return once(trial, *arguments, **options)

    monkeypatch.setattr(comparison, "run_trial", counted)
    results = made(model, data, out, plan(methods=("lora", "full", "pissa")), command="more", quiet=True)
    assert labels == ["lora lr 0.001, seed 0"]
    assert list(results["methods"]) == ["lora", "full", "pissa"]
    first = read(whole)
    assert {name: results["methods"][name] for name in first["methods"]} == first["methods"]
    assert results["command"] == "more"
    (earlier,) = results["earlier"]
    assert (earlier["methods"], earlier["seeds"], earlier["command"]) == (["pissa", "full"], 1, "")
    assert earlier["versions"] == first["versions"]

    monkeypatch.setattr(comparison, "run_trial", _stops_after(0, once))
    more = plan(methods=("lora", "full", "pissa"), seeds=3)
    with pytest.raises(KeyboardInterrupt):
        made(model, data, out, more, quiet=True)
    assert [entry["seeds"] for entry in made_again(out)["earlier"]] == [1, 1]
    with pytest.raises(OutputError, match="seeds: 3 then, 1 now"):
        made(model, data, out, plan(methods=("lora", "full", "pissa")), quiet=True)
    with pytest.raises(OutputError, match=r"methods: \['lora', 'full', 'pissa'\] then, \['lora', 'pissa'\] now"):
        made(model, data, out, plan(methods=("lora", "pissa"), seeds=3), quiet=True)


def test_a_null_arm_stays_that_of_its_method(whole: Path, model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.copytree(out / "runs" / "pissa" / "seed-0", out / "null" / "seed-500")
    with pytest.raises(OutputError, match="has a null arm of pissa, and with these methods it would be of lora"):
        made(model, data, out, plan(methods=("pissa", "full", "lora"), null=True), quiet=True)


def test_a_report_is_written_beside_the_results(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    results = rebuild(out)
    assert "pissa" in (out / "report.md").read_text() and "<svg" in (out / "report.html").read_text()
    assert results == read(out)
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib and jinja2 and scipy: .* or do without it"):
        compare("nowhere", "nothing", tmp_path / "new", plan())
    assert rebuild(out, report=False) == results


def test_every_other_kind_of_method_can_be_compared(data: str, tmp_path: Path) -> None:
    # NF4 needs a multiple of 64 columns
    tiny_llama(hidden=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    methods = ("dora", "adalora", "qpissa", "qlora", "loftq")
    results = made(str(tmp_path / "model"), data, tmp_path / "out", plan(methods=methods, steps=1), quiet=True)
    for name in methods:
        (run,) = results["methods"][name]["runs"]
        assert run["status"] == "done" and len(run["test_losses"]) == 4, name
        assert (results["methods"][name]["quantization_error"] is not None) == (name in QUANTIZED_METHODS)
    # each quantises another residual, so that each begins elsewhere
    assert len({results["methods"][name]["runs"][0]["losses"][0] for name in QUANTIZED_METHODS}) == 3


def test_a_task_of_pissa_eval_is_solved_in_the_place_of_the_test_problems(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posed: list[list[Any]] = []

    def solved(self: Any, model: Any, tokenizer: Any, problems: Any, options: Any) -> Evaluation:
        posed.append([problem.response for problem in problems])
        assert (options.template, options.max_new_tokens) == ("none", 2)
        return accuracy("exact_match", [{"index": i, "correct": i == 0} for i in range(len(problems))])

    monkeypatch.setattr("pissa.evaluation.tasks.gsm8k_and_math.Gsm8k.run", solved)
    others = write(tmp_path / "problems.jsonl", 5)
    chosen = plan(
        methods=("lora",), steps=1, evaluation="gsm8k", evaluation_data=others, accuracy_problems=3, new_tokens=2,
        curve_points=1, curve_problems=2, curve_accuracy=True,
    )  # fmt: skip
    results = made(model, data, tmp_path / "out", chosen, quiet=True)
    (run,) = results["methods"]["lora"]["runs"]
    assert run["test_correct"] == results["base"]["test_correct"] == [True, False, False]
    assert [point["accuracy"] for point in run["during"]] == [0.5]
    # the base, the curve, the end
    assert posed == [[f"The answer is: {3 * i}" for i in range(count)] for count in (3, 2, 3)]


def test_programs_are_run_where_that_is_allowed_and_their_file_stays_the_same(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = tmp_path / "problems.jsonl"
    row = {"task_id": "a/0", "prompt": "x = 1\n", "test": "def check(_): assert x == 1", "entry_point": "x"}
    problems.write_text("".join(json.dumps({**row, "task_id": name}) + "\n" for name in ("a/0", "a/1")))
    ran: list[str] = []

    def passed(program: str, *_: Any) -> Verdict:
        ran.append(program)
        return Verdict(True, "passed", {})

    monkeypatch.setattr("pissa.evaluation.tasks.programs.run_program", passed)
    monkeypatch.setattr("pissa.evaluation.tasks.programs.gaps", lambda: ("using the network",))
    chosen = plan(
        methods=("lora",), steps=1, evaluation="humaneval", evaluation_data=str(problems), allow_code_execution=True,
        allow_unconfined_code=True,
        accuracy_problems=None, new_tokens=2,
    )  # fmt: skip
    out = tmp_path / "out"
    results = made(model, data, out, chosen, quiet=True)
    assert results["base"]["test_correct"] == results["methods"]["lora"]["runs"][0]["test_correct"] == [True, True]
    assert len(ran) == 4 and all(program.startswith("x = 1\n") for program in ran)
    assert results["warnings"] == ["this machine cannot keep generated code from: using the network"]
    assert any("cannot keep generated code from: using the network" in line for line in page_of(results).cautions)
    problems.write_text(problems.read_text().replace("x = 1\\n", "x = 2\\n", 1))
    with pytest.raises(OutputError, match=r"or of the other files, are not those that .* was started with"):
        made(model, data, out, chosen, quiet=True)


def test_a_task_of_glue_is_asked_without_generating(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def likeliest(*_: Any, **options: Any) -> Any:
        return iter([[-2.0, -1.0], [-2.0, -1.0]])

    monkeypatch.setattr("pissa.evaluation.tasks.glue.likelihoods", likeliest)
    problems = tmp_path / "dev.tsv"
    problems.write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    chosen = plan(
        methods=("lora",), steps=1, evaluation="glue/sst2", evaluation_data=str(problems), accuracy_problems=None
    )
    results = made(model, data, tmp_path / "out", chosen, quiet=True)
    assert results["methods"]["lora"]["runs"][0]["test_correct"] == [True, False]


def test_what_cannot_be_solved_is_refused(model: str, data: str, tmp_path: Path) -> None:
    for settings, message in (
        ({"evaluation": "nosuch"}, "no task is called 'nosuch'"),
        ({"evaluation": "perplexity"}, "judges nothing right or wrong"),
        ({"evaluation_data": data}, "name it with --eval"),
        ({"evaluation": "gsm8k", "accuracy_problems": 0}, "nothing is solved"),
        ({"evaluation": "mt-bench"}, r"judges nothing right or wrong; pissa eval on a run \(--keep-runs\)"),
        ({"evaluation": "glue/stsb", "evaluation_data": data}, "judges nothing right or wrong"),
        ({"evaluation": "humaneval", "evaluation_data": data}, "nothing was run. Add --allow-code-execution"),
        ({"evaluation": "gsm8k", "allow_code_execution": True}, "has no use for allow_code_execution"),
        ({"evaluation": "math"}, "give their file with --eval-data"),
        ({"allow_code_execution": True}, "name it with --eval"),
        ({"accuracy_problems": 1}, "one problem makes no accuracy"),
    ):
        with pytest.raises(ConfigError, match=message):  # the plan itself, or what it is made of
            chosen = plan(**{"accuracy_problems": None, **settings})
            made(model, data, tmp_path / "out", chosen, quiet=True)
    unmarked = tmp_path / "unmarked.jsonl"
    unmarked.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) + "\n" for i in range(40)))
    with pytest.raises(ConfigError, match="an accuracy is asked for"):
        made(model, str(unmarked), tmp_path / "out", plan(accuracy_problems=None, curve_accuracy=True), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_a_result(model: str, data: str, tmp_path: Path) -> None:
    # without clipping, so that the weights overflow at once
    wild = Recipe(**{**RECIPE.as_dict(), "max_grad_norm": 0.0})
    results = made(model, data, tmp_path / "out", plan(recipe=wild, rates=(1e30,), methods=("lora",)), quiet=True)
    (run,) = results["methods"]["lora"]["runs"]
    assert run["status"] == "diverged"
    assert run["test_loss"] is None


def test_a_method_whose_search_diverges_everywhere_is_not_compared(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(trial: Any, *_: Any, **options: Any) -> dict[str, Any]:
        found = {"method": trial.recipe.method, "learning_rate": trial.recipe.learning_rate, "rung": trial.rung}
        found |= {"seed": trial.recipe.seed, "status": "diverged", "validation_loss": None, "losses": []}
        trial.directory.mkdir(parents=True)
        (trial.directory / TRIAL).write_text(json.dumps(found))
        return found

    monkeypatch.setattr(comparison, "run_trial", diverged)
    searched = plan(rates=(1e30, 1e31), methods=("lora",), steps=8)
    results = made(model, data, tmp_path / "searched", searched, quiet=True)
    assert results["methods"]["lora"]["learning_rate"] is None
    assert results["methods"]["lora"]["runs"] == []
    assert {trial["status"] for trial in results["methods"]["lora"]["trials"]} == {"diverged"}


def test_other_settings_and_other_rows_are_refused(whole: Path, model: str, data: str, tmp_path: Path) -> None:
    methods = ("pissa", "full")
    with pytest.raises(OutputError, match="steps: 2 then, 3 now"):
        made(model, data, whole, plan(methods=methods, steps=3), quiet=True)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = write(tmp_path / Path(data).name, 61)
    record = json.loads((out / "compare.json").read_text())
    (out / "compare.json").write_text(json.dumps({**record, "settings": {**record["settings"], "data": other}}))
    with pytest.raises(OutputError, match=r"are not those that .* was started with"):
        made(model, other, out, plan(methods=methods), quiet=True)
    with pytest.raises(OutputError, match="already holds something else"):
        made(model, data, tmp_path, plan(), quiet=True)
    with pytest.raises(OutputError, match=r"compare.json is missing"):
        made_again(tmp_path)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(model: str, data: str, tmp_path: Path) -> None:
    for settings, message in (
        ({"methods": ("lora", "nosuch")}, "no such method: nosuch"),
        ({"methods": ("lora", "lora")}, "lora named twice"),
        ({"methods": ()}, "no method to compare"),
        ({"steps": 0}, "steps is 0"),
        ({"search_runs": 2}, "search_runs is 2; allowed: 3 to 12"),
        ({"rates": ()}, "no learning rate"),
        ({"recipe": Recipe(learning_rate=1e-3)}, r"learning_rate, which a comparison chooses; give it rates"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(**settings)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    with pytest.raises(DataError, match="a comparison needs at least"):
        made(model, str(short), tmp_path / "out", plan(), quiet=True)
    assert not (tmp_path / "out").exists()


def read(out: Path) -> dict[str, Any]:
    """What a finished comparison found."""
    return json.loads((out / "results.json").read_text())


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    keys = ("losses", "grad_norms", "test_losses", "validation_loss", "seed")
    return {
        name: [{key: run[key] for key in keys} for run in method["runs"]] for name, method in results["methods"].items()
    }


def _stops_after(count: int, function: Any) -> Any:
    """The function for so many calls, then what Ctrl-C does."""
    left = [count]

    def called(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*arguments, **options)

    return called


def _killed(*_: Any) -> Any:
    raise KeyboardInterrupt
