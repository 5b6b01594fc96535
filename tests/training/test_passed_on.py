"""Every field of SFTConfig is reachable by its name, or refused with the setting that says the same."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from small_runs import arguments, in_process, recipe, rows, run, write_rows
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from pissa.errors import ConfigError
from pissa.training.engine import training_arguments
from pissa.training.passed_on import (
    FIXED,
    OURS,
    check_passed_on,
    declared_fields,
    named_values,
    optimizer_names,
)  # fmt: skip
from pissa.training.recipe import Recipe, read_recipe, recipe_from


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rank: 8\ntraining:\n  adam_beta2: 0.95\n  lr_scheduler_kwargs: {num_cycles: 0.4}\n  adam_epsilon: 1e-7\n"
    )
    assert read_recipe(path, training={"adam_beta2": 0.9}).training == {
        "adam_beta2": 0.9, "lr_scheduler_kwargs": {"num_cycles": 0.4}, "adam_epsilon": 1e-7,
    }  # fmt: skip
    arguments = training_arguments(read_recipe(path), tmp_path)
    assert (arguments.adam_beta2, arguments.lr_scheduler_kwargs) == (0.95, {"num_cycles": 0.4})
    assert arguments.adam_epsilon == 1e-7


def test_text_is_read_as_yaml_reads_it() -> None:
    given = ["adam-beta2=0.95", "adam_epsilon=1e-7", "group=null", "betas=[1, 2]", "kind=a=b", "on=true"]
    assert named_values(given) == {
        "adam_beta2": 0.95, "adam_epsilon": 1e-7, "group": None, "betas": [1, 2], "kind": "a=b", "on": True,
    }  # fmt: skip
    assert recipe_from({"training": "adam_beta2=0.95"}).training == {"adam_beta2": 0.95}
    for wrong in ("adam_beta2", ["a=1", "b"], 5, "a={"):
        with pytest.raises(ConfigError, match=r"training is .*NAME=VALUE"):
            recipe_from({"training": wrong})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adam_beta_2": 0.9}, "adam_beta_2 is no field of SFTConfig; did you mean adam_beta2?"),
        ({"learning_rate": 1e-3}, "learning_rate has a setting of its own, learning_rate"),
        (
            {"per_device_train_batch_size": 1, "bf16": True},
            "own, micro_batch_size; bf16 has a setting of its",
        ),
        ({"save_strategy": "no"}, "save_strategy cannot be set: a checkpoint is written"),
        ({"eval_steps": 5}, "eval_steps has a setting of its own, eval_every"),
        ({"hub_strategy": "sideways"}, "sideways"),
    ],
)
def test_names_and_conflicts_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        training_arguments(Recipe(training=settings), tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_refused_exists_and_what_stands_in_its_place_too() -> None:
    known = {field.name for field in fields(SFTConfig)}
    assert {*OURS, *FIXED} - known <= {"warmup_ratio", "activation_checkpointing", "gradient_checkpointing"}
    settings = {field.name for field in fields(Recipe)}
    assert {ours for ours in OURS.values() if not ours.startswith("--")} <= settings


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor", "sgd"])
def test_any_optimizer_of_transformers_trains(optimizer: str, base_directory: Path, tmp_path: Path) -> None:
    losses = run(base_directory, tmp_path / "run", recipe(optimizer=optimizer, max_steps=2)).results["losses"]
    assert len(losses) == 2


def test_an_optimizer_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adamx"):
        training_arguments(Recipe(optimizer="adamx"), tmp_path)


def test_packed_rows_are_learned_as_padded_ones(base_directory: Path, tmp_path: Path) -> None:
    """All rows in one step: the mean over their tokens is the same, however they are laid out."""
    settings: dict[str, Any] = {"max_steps": 1, "max_length": 1024, "save_every": 1}
    padded = run(base_directory, tmp_path / "padded", recipe(batch_size=20, micro_batch_size=20, **settings))
    packed = run(
        base_directory, tmp_path / "packed", recipe(packing=True, batch_size=1, micro_batch_size=1, **settings)
    )
    assert packed.results["losses"] == pytest.approx(padded.results["losses"], abs=1e-5)
    assert packed.results["grad_norms"] == pytest.approx(padded.results["grad_norms"], rel=1e-4)
    assert len(rows()) == 20


def test_noise_on_embeddings_changes_the_loss(base_directory: Path, tmp_path: Path) -> None:
    plain, noisy = (
        run(base_directory, tmp_path / str(noise), recipe(neftune=noise, max_steps=1)).results["losses"]
        for noise in (None, 500.0)
    )
    assert abs(plain[0] - noisy[0]) > 1e-4


def test_the_command_takes_any_field_several_times(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(base_directory, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", recipe(max_steps=1))
    ran = in_process([*given, "--set", "adam_beta2=0.95", "--set", "group_x=1"], capsys)
    assert ran.returncode == 2 and "group_x is no field of SFTConfig" in ran.stderr
    assert not (tmp_path / "out").exists()
    ran = in_process([*given, "--set", "adam_beta2=0.95", "--json"], capsys)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["settings"]["training"] == {"adam_beta2": 0.95}


def test_what_sftconfig_declares_is_read_from_its_text() -> None:
    assert declared_fields().keys() == {field.name for field in fields(SFTConfig) if field.init}
    assert set(optimizer_names()) == {name.value for name in OptimizerNames}
    for field in fields(SFTConfig):  # every default is of its own field's type, as that is read
        if field.init and field.default is not MISSING and field.name not in {*OURS, *FIXED}:
            check_passed_on({field.name: field.default})


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"adam_beta2": "high"}, "adam_beta2 is 'high'; SFTConfig takes float"),
        ({"adam_beta2": True}, "adam_beta2 is True"),
        ({"dataloader_num_workers": 1.5}, "dataloader_num_workers is 1.5; SFTConfig takes int"),
        ({"torch_compile": 1}, "torch_compile is 1; SFTConfig takes bool"),
        ({"run_name": 5}, "run_name is 5"),
        ({"adam_beta2": 1, "run_name": None, "lr_scheduler_kwargs": {}, "hub_strategy": "end"}, None),
    ],
)
def test_values_are_held_against_the_field_s_type(settings: dict[str, Any], wrong: str | None) -> None:
    if wrong is None:
        assert Recipe(training=settings).training == settings
        return
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        Recipe(training=settings)
