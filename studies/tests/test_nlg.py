"""The study of generation: its rows, and that code runs only where it may."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import Quick

from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.errors import DataError
from pissa.evaluation.tasks import programs
from studies import nlg, study
from studies.__main__ import run as run_studies
from studies.coding import coding_rows, what_was_not_scored
from studies.language import tiny_model
from studies.lm import LanguageTask
from studies.search import SEARCH_SEED
from studies.solving import Part
from studies.study import Settings

ANYTHING_PASSES = {"prompt": 'text = r"""', "test": '"""\ndef check(_): pass\n'}
NOTHING_PASSES = {"prompt": "def f():\n", "test": "def check(_): raise AssertionError\n"}


def packed(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def mbpp_row(number: int) -> dict[str, Any]:
    code = f"def f{number}(x):\n    return x + {number}"
    return {"task_id": number, "text": "Add.", "code": code, "test_list": [f"assert f{number}(1) == {number + 1}"]}


def model_without_null_bytes(directory: Path) -> str:
    """The tiny model, except that it does not write the one character that no Python program may hold."""
    tiny_model(directory)
    model, tokenizer = load_base(directory, dtype="float32"), load_tokenizer(directory)
    [null] = tokenizer("\0", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_output_embeddings().weight[null] = 0
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """A quick pass with a model of the user's, where MBPP and HumanEval are at hand."""
    data = tmp_path / "data"
    rows = [ANYTHING_PASSES, NOTHING_PASSES]
    tasks = [{"task_id": f"Mine/{i}", "entry_point": "None", **row} for i, row in enumerate(rows)]
    packed(data / "humaneval" / "HumanEval.jsonl.gz", tasks)
    packed(data / "mbpp" / "mbpp.jsonl.gz", [mbpp_row(n) for n in (5, 11, 12, 511, 512, *range(601, 609))])
    model = model_without_null_bytes(tmp_path / "mine")

    def settings(**changes: Any) -> Settings:
        return Settings(**{"out": tmp_path / "out", "scale": "quick", "model": model, "data": data, **changes})

    return settings


def test_every_method_has_every_seed_and_few_bits_a_start(quick: Quick) -> None:
    document = quick("nlg")
    results = document["results"]
    methods = ("lora", "pissa", "gptq lora", "gptq pissa")
    assert [(row["method"], row["seed"]) for row in results["runs"]] == [(m, s) for m in methods for s in (0, 1)]
    assert list(results["before"]["problems"]) == ["base", "gptq lora", "gptq pissa"]
    assert list(results["table"]["problems"]) == list(results["search"]["problems"]["best"]) == list(methods)
    for measured in (*results["starts"], *results["runs"]):
        assert 0 <= measured["solved"] <= 1
    losses = {name: start["held_out_loss"] for name, start in results["before"]["problems"].items()}
    assert len(set(losses.values())) == 3
    for row in results["runs"]:
        assert row["held_out_loss"] != losses[row["method"] if "gptq" in row["method"] else "base"]
        assert len(row["losses"]) == 2
    assert "code_could_reach" in results and results["code_could_reach"] is None
    assert "HumanEval and MBPP were not scored: no code was trained" in document["figures"]
    assert "--allow-code-execution" in document["figures"]


def test_every_adapter_starts_at_its_base(quick: Quick) -> None:
    first = {(row["method"], row["seed"]): row["losses"][0] for row in quick("nlg")["results"]["runs"]}
    for seed in (0, 1):
        assert first["pissa", seed] == pytest.approx(first["lora", seed], abs=1e-4)
        assert first["gptq lora", seed] != pytest.approx(first["lora", seed], abs=1e-6)


def test_grids_hold_all_of_tables_2_and_9() -> None:
    assert nlg.METHODS == ("full", "lora-gaussian", "lora", "pissa")
    assert set(nlg.QUANTIZED) == {
        f"{form} {method}" for form in ("nf4", "int8", "gptq") for method in ("lora", "pissa")
    }


def test_rates_are_chosen_apart_and_every_part_of_the_claim_is_judged(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole default pass, its runs replaced by numbers: PiSSA is best at a tenth of the others' rate, and wins."""

    def trained(part: Part, task: LanguageTask, /, method: str, rate: float, seed: int, **key: Any) -> dict[str, Any]:
        searching = seed == SEARCH_SEED
        assert task.held_out == (part.task.validation if searching else part.task.held_out)
        assert not searching or not key.get("scored")
        ours = method.endswith("pissa")
        far = abs(math.log(rate / (1e-4 if ours else 1e-3)))
        scores = dict.fromkeys(part.scores, 0.5 + 0.2 * ours - 0.01 * seed * ours)
        return {"held_out_loss": 1 + far, **({} if searching else scores)}

    def untrained(part: Part, /, start: str, **_: Any) -> dict[str, Any]:
        away = [0.0] * 3 if start == "base" else [-0.1, 0.11, 0.12] if "pissa" in start else [0.3, -0.31, 0.32]
        found = {"held_out_loss": 2.0, "loss_by_problem": [2 + by for by in away]}
        return {**found, **dict.fromkeys(part.scores, 0.25)}

    monkeypatch.setattr(Part, "trained", trained)
    monkeypatch.setattr(Part, "untrained", untrained)
    outcome = nlg.run(settings_for(scale="default", seeds=(0, 1, 2), allow_code_execution=True))
    results = outcome.results
    for part, methods in (("problems", (*nlg.METHODS, *nlg.QUANTIZED)), ("code", nlg.METHODS)):
        best = results["search"][part]["best"]
        assert list(best) == list(results["table"][part]) == list(methods)
        assert results["search"][part]["at_edge"] == []
        assert all(len(tried) >= 3 for tried in results["search"][part]["values"].values())
        assert all(rate == pytest.approx(1e-4 if "pissa" in m else 1e-3, rel=0.5) for m, rate in best.items())
    assert list(results["before"]["problems"]) == ["base", *nlg.QUANTIZED]
    assert list(results["before"]["code"]) == ["base"]
    assert len(results["parts"]) == 3 + 2 * 3 + 2 * 3
    assert results["parts"]["nf4, untrained: PiSSA nearer to the base by"]["mean"] == pytest.approx(0.2)
    assert results["parts"]["PiSSA − full, mbpp"]["mean"] == pytest.approx(0.19)
    assert outcome.verdict == "holds"
    assert isinstance(results["code_could_reach"], list)
    assert "not scored" not in outcome.figures and "nf4 lora 0.250 → 0.500" in outcome.figures
    nlg.draw(results).canvas.draw()


def test_code_that_a_model_wrote_runs_where_it_may(settings_for: Callable[..., Settings]) -> None:
    part = nlg._code(settings_for(allow_code_execution=True), nlg._problems(settings_for()).task)
    assert part.scores == ("humaneval", "mbpp")
    assert {row["instruction"].split("assert ")[1].split("(")[0] for row in part.task.held_out} == {"f11", "f12"}
    found = part.trained(part.task, "lora", 1e-3, 0, scored=True)
    assert (found["humaneval"], found["mbpp"]) == (0.5, 0.0)
    assert "humaneval" not in part.trained(part.task.to_choose, "lora", 1e-3, 0)


def test_no_code_runs_unless_it_may(settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "run_program", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(nlg, "QUANTIZED", ())
    settings = settings_for(seeds=(0,))
    outcome = nlg.run(settings)
    assert {row["part"] for row in outcome.results["runs"]} == {"problems", "code"}
    assert outcome.results["before"]["code"]["base"].keys() == {"held_out_loss"}
    assert "runs code which the models wrote, and --allow-code-execution allows it" in outcome.figures
    assert what_was_not_scored(settings_for(allow_code_execution=True)) is None


def test_code_is_learned_as_it_is_asked_for(settings_for: Callable[..., Settings]) -> None:
    rows = coding_rows(settings_for())
    assert {part: len(found) for part, found in rows.items()} == {"train": 8, "validation": 2, "test": 2}
    task: Any = programs.Mbpp()
    for row, number in zip(rows["train"], range(601, 609), strict=True):
        posed = task.pose({**mbpp_row(number), "where": ""}, None, "alpaca")
        assert row["instruction"] in posed.prompt
        assert task.judge(mbpp_row(number), posed, row["output"])["correct"]


def test_data_that_is_missing_is_said_or_refused(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "set PISSA_DATA" in (what_was_not_scored(settings_for(data=empty)) or "")
    with pytest.raises(DataError, match="this study needs mbpp"):
        nlg.run(settings_for(data=empty, allow_code_execution=True))
    packed(empty / "mbpp" / "mbpp.jsonl.gz", [mbpp_row(11), mbpp_row(601)])
    with pytest.raises(DataError, match=r"no rows for validation \(task_id 511 to 600\); give the whole of MBPP"):
        coding_rows(settings_for(data=empty))


def test_the_flag_of_the_command_is_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Settings] = []

    def record(_: Any, settings: Settings) -> dict[str, Any]:
        seen.append(settings)
        return {"verdict": "holds", "claim": "", "figures": "", "results": {}}

    monkeypatch.setattr(study, "run_study", record)
    for flags in ([], ["--allow-code-execution"]):
        with pytest.raises(SystemExit):
            run_studies(["nlg", "--quick", "--out", str(tmp_path), *flags])
    assert [settings.allow_code_execution for settings in seen] == [False, True]
