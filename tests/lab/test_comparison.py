"""A comparison end to end on a tiny model: what it writes, that it goes on where it stopped, and its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import ConfigError, DataError, OutputError
from pissa.lab.comparison import run as comparison
from pissa.lab.comparison.plan import Plan
from pissa.lab.comparison.run import compare, rebuild
from pissa.lab.comparison.trial import KEPT
from pissa.train.recipe import Recipe
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


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Sixty rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    return str(path)


def plan(**settings: Any) -> Plan:
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
    return Plan(**{**usual, **settings})


def test_a_comparison_holds_everything_and_is_made_again_from_its_directories(
    model: str, data: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How many are left now? " * 20)
    out = tmp_path / "out"
    chosen = plan(
        rates=None, search_runs=3, rungs=1, steps=4, null=True, accuracy_problems=2, new_tokens=2, curve_points=2,
        forgetting=str(text),
    )  # fmt: skip
    results = compare(model, data, out, chosen, command="pissa compare", quiet=True)
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
        # the last measurement while training is of the model that is tested
        assert run["during"][-1]["loss"] == pytest.approx(run["test_loss"], abs=1e-5), name
        assert len(run["test_losses"]) == 4
        assert len(run["test_correct"]) == 2
        assert run["perplexity_before"] == results["base"]["perplexity"] != run["perplexity_after"]
        assert run["seconds"] > 0
    assert results["null"]["method"] == "lora"
    assert [run["seed"] for run in results["null"]["runs"]] == [500]
    # the same base and the same batches: the function is preserved at step 0
    lora, pissa = (results["methods"][name]["runs"][0] for name in ("lora", "pissa"))
    assert lora["losses"][0] == pytest.approx(pissa["losses"][0], abs=1e-5)
    trial = out / "runs" / "pissa" / "seed-0"
    assert {str(path.relative_to(trial)) for path in trial.rglob("*") if path.is_file()} == set(KEPT)

    (out / "results.json").unlink()
    assert rebuild(out) == results


def test_what_is_done_is_not_done_again_and_a_stopped_comparison_ends_the_same(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(model, data, tmp_path / "whole", plan(), quiet=True)
    out = tmp_path / "stopped"
    once = comparison.run_trial
    monkeypatch.setattr(comparison, "run_trial", _stops_after(1, once))
    with pytest.raises(KeyboardInterrupt, match="all finished runs are saved"):
        compare(model, data, out, plan(), quiet=True)
    assert [len(method["runs"]) for method in rebuild(out)["methods"].values()] == [1, 0]
    monkeypatch.setattr(comparison, "run_trial", once)
    again = compare(model, data, out, plan(), quiet=True)
    assert _numbers(again) == _numbers(whole)
    monkeypatch.setattr(comparison, "run_trial", _stops_after(0, once))
    assert compare(model, data, out, plan(), quiet=True) == again


def test_a_run_killed_before_it_was_scored_is_scored_from_its_directory(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("pissa", "full")
    whole = compare(model, data, tmp_path / "whole", plan(methods=methods), quiet=True)
    out = tmp_path / "killed"
    with monkeypatch.context() as patched:
        patched.setattr("pissa.lab.comparison.trial._scores", _killed)
        for _ in methods:
            with pytest.raises(KeyboardInterrupt):
                compare(model, data, out, plan(methods=methods), quiet=True)
    again = compare(model, data, out, plan(methods=methods), quiet=True)
    for name in methods:
        before, after = (found["methods"][name]["runs"][0] for found in (whole, again))
        assert after["losses"] == before["losses"]
        assert after["test_losses"] == pytest.approx(before["test_losses"], abs=1e-5)


def test_a_run_that_diverges_is_a_result(model: str, data: str, tmp_path: Path) -> None:
    # without clipping, so that the weights overflow at once
    wild = Recipe(**{**RECIPE.as_dict(), "max_grad_norm": 0.0})
    results = compare(model, data, tmp_path / "out", plan(recipe=wild, rates=(1e30,), methods=("lora",)), quiet=True)
    (run,) = results["methods"]["lora"]["runs"]
    assert run["status"] == "diverged"
    assert run["test_loss"] is None
    searched = plan(recipe=wild, rates=(1e30, 1e31), methods=("lora",), steps=8)
    results = compare(model, data, tmp_path / "searched", searched, quiet=True)
    assert results["methods"]["lora"]["learning_rate"] is None
    assert results["methods"]["lora"]["runs"] == []
    assert {trial["status"] for trial in results["methods"]["lora"]["trials"]} == {"diverged"}


def test_other_settings_and_other_rows_are_refused(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(model, data, out, plan(methods=("lora",), steps=1), quiet=True)
    with pytest.raises(OutputError, match="steps: 1 then, 2 now"):
        compare(model, data, out, plan(methods=("lora",), steps=2), quiet=True)
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows(61)))
    with pytest.raises(OutputError, match=r"are not those that .* was started with"):
        compare(model, data, out, plan(methods=("lora",), steps=1), quiet=True)
    with pytest.raises(OutputError, match="already holds something else"):
        compare(model, data, tmp_path, plan(), quiet=True)
    with pytest.raises(OutputError, match=r"compare.json is missing"):
        rebuild(tmp_path)


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
        compare(model, str(short), tmp_path / "out", plan(), quiet=True)
    assert not (tmp_path / "out").exists()


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
