"""What `learning_rate: auto` measures, and that a run which uses it is the run with that rate given."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import log_of, recipe, result_tensors, rows, run

from pissa import PissaConfig, adapt
from pissa.data.encode import encode
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError, TrainingError
from pissa.training import course
from pissa.training.rate_adviser import MEASURED_ROWS, MULTIPLE, PROBE_STEPS, ProbeData, advise, best_rate, probe_data
from pissa.training.recipe import Recipe, read_recipe, recipe_from
from tiny import global_generators, same_tensors, snapshot, tiny_llama, tiny_tokenizer, token_batch


def probes(steps: int = 2) -> ProbeData:
    """The same two rows in every step, in two micro-batches, and to measure on; all tokens are learned."""
    rows = [token_batch()[i : i + 1] for i in range(2)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    return ProbeData([batches] * steps, batches, 2)


def adapted(**settings: Any) -> Any:
    return adapt(tiny_llama(), PissaConfig(4, **settings))


@pytest.mark.parametrize("best", [3e-6, 0.0123, 0.9])
def test_the_best_rate_of_a_bowl_is_its_lowest_point(best: float) -> None:
    rate, tried = best_rate(lambda rate: math.log(rate / best) ** 2 if rate else 1e9)
    assert rate == pytest.approx(best, rel=1e-6)
    assert len(tried) < 16


def test_beyond_a_cliff_it_stays_on_this_side() -> None:
    rate, _ = best_rate(lambda rate: 1 - rate if rate < 2e-2 else math.nan)
    assert 1e-2 <= rate < 2e-2
    # also where it begins beyond
    rate, _ = best_rate(lambda rate: 1 - rate if rate < 2e-5 else math.inf)
    assert 1e-5 <= rate < 2e-5


def test_where_nothing_helps_it_says_so() -> None:
    with pytest.raises(TrainingError, match="no learning rate lowers the loss"):
        best_rate(lambda rate: 1 + rate)
    with pytest.raises(TrainingError, match="no learning rate lowers the loss"):
        best_rate(lambda rate: math.nan if rate else 1.0)
    with pytest.raises(TrainingError, match="not finite before the first step"):
        best_rate(lambda _: math.nan)


@pytest.mark.parametrize("settings", [{}, {"method": "lora-kaiming"}, {"placement": "offset"}, {"use_dora": True}])
def test_the_losses_are_those_after_so_many_steps_of_adamw(settings: dict[str, Any]) -> None:
    """torch's AdamW and transformers' loss as the oracle."""
    advice = advise(adapted(**settings), probes(), recipe())
    assert advice.learning_rate == float(f"{MULTIPLE * advice.best_probe:.2g}")
    assert [rate for rate, _ in advice.tried] == sorted(rate for rate, _ in advice.tried)
    for rate, loss in advice.tried[:: len(advice.tried) - 1]:
        other = adapted(**settings)
        trained = [p for p in other.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        for _ in range(2):
            other(input_ids=token_batch(), labels=token_batch()).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe().max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            assert float(other(input_ids=token_batch(), labels=token_batch()).loss) == pytest.approx(loss, rel=1e-4)


def test_the_model_and_the_generators_stay_as_they_were() -> None:
    model = adapted(dropout=0.1, allow_dropout=True, method="lora-kaiming")
    before, generators = snapshot(model), global_generators()
    modes = [module.training for module in model.modules()]
    first = advise(model, probes(), recipe())
    assert same_tensors(before, snapshot(model)) and generators == global_generators()
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert advise(model, probes(), recipe()) == first


def test_factors_twice_as_long_want_a_rate_twice_as_high() -> None:
    """s·(B + ηb)·(A + ηa) with both factors and η times c, and s divided by c², is the same product."""
    short, long = adapted(), adapted(alpha=1.0)
    found = [advise(model, probes(), recipe(max_grad_norm=0.0)).best_probe for model in (short, long)]
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)


def test_lora_plus_wants_a_lower_rate() -> None:
    model = adapted(method="lora-kaiming")
    plain = advise(model, probes(steps=1), recipe())
    plus = advise(model, probes(steps=1), recipe(loraplus_ratio=4.0))
    # in the first step B moves alone
    assert plus.best_probe == pytest.approx(plain.best_probe / 4, rel=0.1)


def test_rows_are_drawn_with_the_seed_and_measured_on_others() -> None:
    encoded = encode(examples_from_rows(rows(60)), tiny_tokenizer(), template="none", max_length=64)
    data = probe_data(encoded, recipe(batch_size=6, micro_batch_size=3), 0)
    assert [[len(batch["input_ids"]) for batch in step] for step in data.steps] == [[3, 3]] * PROBE_STEPS
    learned = {row for step in data.steps for batch in step for row in _texts(batch)}
    measured = {row for batch in data.measured for row in _texts(batch)}
    assert len(learned) == 6 * PROBE_STEPS and len(measured) == MEASURED_ROWS and not learned & measured
    assert data.rows == 6 * PROBE_STEPS + MEASURED_ROWS
    again, other = (probe_data(encoded, recipe(seed=seed, batch_size=6, micro_batch_size=6), 0) for seed in (0, 1))
    assert {row for batch in again.measured for row in _texts(batch)} == measured
    assert {row for batch in other.measured for row in _texts(batch)} != measured


@pytest.mark.parametrize("settings", [{"method": "pissa"}, {"method": "full"}, {"quantize": "int8"}])
def test_a_run_with_auto_is_the_run_with_that_rate(
    settings: dict[str, Any], base_directory: Path, tmp_path: Path
) -> None:
    found = run(base_directory, tmp_path / "auto", recipe(**settings, learning_rate="auto", max_steps=3))
    rate = found.results["learning_rate"]
    assert isinstance(rate, float) and found.results["settings"]["learning_rate"] == "auto"
    assert found.results["advice"]["learning_rate"] == rate
    record = json.loads((tmp_path / "auto" / "state" / "run.json").read_text())
    assert record["advice"] == json.loads(json.dumps(found.results["advice"]))
    given = run(base_directory, tmp_path / "given", recipe(**settings, learning_rate=rate, max_steps=3))
    assert given.results["advice"] is None
    assert log_of(tmp_path / "auto") == log_of(tmp_path / "given")
    assert same_tensors(result_tensors(tmp_path / "auto"), result_tensors(tmp_path / "given"))


def test_a_run_that_goes_on_does_not_estimate_again(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(learning_rate="auto", max_steps=4)
    whole = run(base_directory, tmp_path / "whole", settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "state" / "checkpoint-4")
    for file in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "again" / file).unlink()
    monkeypatch.setattr(course, "advise", None)
    again = run(base_directory, tmp_path / "again", settings)
    assert again.results["losses"] == whole.results["losses"]
    assert again.results["advice"] == json.loads(json.dumps(whole.results["advice"]))


def test_one_row_is_enough(base_directory: Path, tmp_path: Path) -> None:
    settings = recipe(learning_rate="auto", max_steps=1, batch_size=1, micro_batch_size=1)
    assert run(base_directory, tmp_path / "out", settings, rows(1)).results["learning_rate"] > 0


def test_auto_is_read_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("learning-rate: auto\n")
    assert read_recipe(tmp_path / "recipe.yaml").learning_rate == "auto"
    assert recipe_from({"learning_rate": "auto"}) == Recipe(learning_rate="auto")
    assert recipe_from({"learning_rate": "2e-4"}).learning_rate == 2e-4


def test_what_cannot_be_estimated_is_refused(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("Auto", "automatic", True):
        with pytest.raises(ConfigError, match=r"learning_rate is .*; give a positive number, or auto"):
            recipe_from({"learning_rate": wrong})
    with pytest.raises(ConfigError, match=r"epochs is 'auto'; give a positive number$"):
        recipe_from({"epochs": "auto"})
    # accelerate's own variable would have Trainer shard
    monkeypatch.setattr(course, "FSDP", "PISSA_TEST_SHARDS")
    monkeypatch.setenv("PISSA_TEST_SHARDS", "true")
    with pytest.raises(ConfigError, match="before FSDP or DeepSpeed shard it; give a number"):
        run(base_directory, tmp_path / "out", recipe(learning_rate="auto"))
    assert not (tmp_path / "out").exists()


def _texts(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """A batch's rows without padding."""
    return [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
