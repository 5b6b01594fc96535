"""Settings come from flags and YAML alike, and what cannot be right is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import ConfigError
from pissa.training.engine import training_arguments
from pissa.training.recipe import Recipe, read_recipe, recipe_from


def test_the_defaults_are_the_paper_s() -> None:
    recipe = Recipe()
    assert (recipe.learning_rate, recipe.schedule, recipe.warmup_ratio, recipe.weight_decay) == (
        2e-5,
        "cosine",
        0.03,
        0,
    )
    assert (recipe.batch_size, recipe.max_length, recipe.epochs, recipe.dropout) == (128, 512, 1, 0)
    assert (recipe.template, recipe.target_modules, recipe.alpha) == ("auto", "all-linear", None)
    assert recipe.pissa_config().scale(recipe.rank, recipe.pissa_config().alpha) == 1


def test_trainer_gets_every_setting(tmp_path: Path) -> None:
    recipe = Recipe(
        learning_rate=3e-4,
        schedule="linear",
        warmup_ratio=0.1,
        weight_decay=0.01,
        max_grad_norm=0.5,
        epochs=2.5,
        max_steps=7,
        batch_size=12,
        micro_batch_size=3,
        save_every=9,
        seed=11,
    )
    given = training_arguments(recipe, tmp_path)
    assert (given.learning_rate, given.lr_scheduler_type, given.warmup_steps) == (3e-4, "linear", 0.1)
    assert (given.weight_decay, given.max_grad_norm, given.num_train_epochs, given.max_steps) == (0.01, 0.5, 2.5, 7)
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (3, 4)
    assert (given.save_steps, given.seed, given.optim, given.report_to) == (9, 11, "adamw_torch", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.1464)])
def test_every_schedule_warms_up(tmp_path: Path, schedule: Any, last: float) -> None:
    from torch import nn, optim
    from transformers import get_scheduler

    given = training_arguments(Recipe(schedule=schedule, warmup_ratio=0.2), tmp_path)
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    warmup = given.get_warmup_steps(10)
    scheduler = get_scheduler(given.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [0, 0.5, 1] and rates[8] == pytest.approx(last, abs=1e-4)


def test_yaml_holds_settings_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: lora\nrank: 8\nlearning-rate: 2e-4\nmax_steps: 30\ntarget-modules: [q_proj, v_proj]\n")
    recipe = read_recipe(path, rank=4, seed=None, batch_size=8)
    assert recipe == Recipe(
        method="lora",
        rank=4,
        learning_rate=2e-4,
        max_steps=30,
        batch_size=8,
        target_modules=("q_proj", "v_proj"),
    )
    path.write_text("")
    assert read_recipe(path) == Recipe()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("self_attn.q_proj", ("self_attn.q_proj",)),
        ("q_proj, v_proj,", ("q_proj", "v_proj")),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r".*\.layers\.\d{1,2}\..*_proj", r".*\.layers\.\d{1,2}\..*_proj"),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
    ],
)
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_modules_mean_the_same_in_yaml_flag_and_python(tmp_path: Path, name: str, given: Any, meant: Any) -> None:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({name: given}))
    for recipe in (read_recipe(path), recipe_from({name: given}), Recipe(**{name: given})):
        value = getattr(recipe, name)
        assert (value if isinstance(value, str) else tuple(value)) == meant
        assert getattr(recipe.pissa_config(), name) == value


def test_the_adapter_gets_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("use_rslora: true\nrank_pattern: {q_proj: 2}\nalpha_pattern: {v_proj: 3.5}\n")
    config = read_recipe(path, modules_to_save="lm_head, norm", exclude_modules="o_proj").pissa_config()
    assert (config.use_rslora, config.exclude_modules, config.modules_to_save) == (
        True,
        ("o_proj",),
        ("lm_head", "norm"),
    )
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 2}, {"v_proj": 3.5})


@pytest.mark.parametrize(
    ("flag", "written", "meant"),
    [
        ("3, 7", "[3, 7]", (3, 7)),
        ("3", "[3]", (3,)),
        ("", "[]", ()),
        (None, "{embed_tokens: [3, 7]}", {"embed_tokens": (3, 7)}),
    ],
)
def test_token_ids_mean_the_same_in_yaml_flag_and_python(
    tmp_path: Path, flag: str | None, written: str, meant: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"trainable_token_indices: {written}\n")
    flags = [] if flag is None else [recipe_from({"trainable_token_indices": flag})]
    for recipe in (read_recipe(path), Recipe(trainable_token_indices=meant), *flags):
        assert recipe.trainable_token_indices == recipe.pissa_config().trainable_token_indices == meant


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    import yaml

    recipe = Recipe(
        method="lora-gaussian",
        alpha=32.0,
        target_modules=("q_proj",),
        gradient_checkpointing=True,
        trainable_token_indices=(3, 7),
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in recipe.as_dict().items()}))
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        ("rank: [", "is not YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "has aliases"),
        ("x: " + "y" * (1 << 20), "bytes; at most"),
        ("wings: 2\n", "names wings; known: rank, alpha, method"),
        ("- 1\n", "holds list; give lines of the form"),
        ("learningrate: 1\nrnak: 2\n", "names learningrate (did you mean learning_rate?), rnak (did you mean rank?)"),
        (b"\xff\xfe\x00rank: 1", "is not YAML"),
    ],
)
def test_a_settings_file_that_is_none_is_refused(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"method": "dor"}, "method is 'dor'; allowed: pissa, random-pissa, "),
        ({"method": "pisa"}, "did you mean pissa?"),
        ({"method": "PiSSA"}, "did you mean pissa?"),
        ({"method": None}, "method is None; allowed"),
        ({"rank": 0, "alpha": 0, "schedule": "x"}, "rank is 0; give a whole number of at least 1; alpha is 0.0; give"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; allowed: auto, fp32, bf16"),
        ({"schedule": "cosin"}, "schedule is 'cosin'"),
        ({"template": ["alpaca"]}, "template is ('alpaca',)"),
        (
            {"report_to": "wandb,tensorbord"},
            "report_to is ('wandb', 'tensorbord'); allowed: trackio, wandb, tensorboard",
        ),
        ({"rank": 0}, "rank is 0; give a whole number"),
        ({"rank": 4.5}, "rank is 4.5"),
        ({"rank": "many"}, "rank is 'many'; give a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({"rank": [1, 2]}, "rank is (1, 2)"),
        ({"rank": None}, "rank is None"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": "nan"}, "alpha is nan; give a positive number"),
        ({"dropout": 0.05}, "allow_dropout"),
        ({"dropout": 1, "method": "lora"}, "dropout is 1"),
        ({"allow_dropout": "yes"}, "allow_dropout is 'yes'; give true or false"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1; give true or false"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": "inf"}, "learning_rate is inf"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        (
            {"optimizer": "spectral", "learning_rate": "auto"},
            "with optimizer spectral, whose own is 0.05",
        ),
        ({"optimizer": "spectral", "loraplus_ratio": 4}, "weighs A and B itself; leave loraplus_ratio out"),
        ({"optimizer": "spectral", "method": "full"}, "method full has no adapter: leave optimizer out"),
        ({"optimizer": "spectral", "method": "adalora"}, "method adalora has three factors: leave optimizer out"),
        ({"learning_rate": True}, "learning_rate is True; give a positive number, or auto"),
        ({"warmup_ratio": 1}, "warmup_ratio is 1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"max_grad_norm": -0.1}, "max_grad_norm is -0.1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0; give a whole number of at least 1"),
        ({"max_length": 1}, "max_length is 1; give a whole number of at least 2"),
        ({"save_every": 0}, "save_every is 0"),
        ({"export_rank": 0}, "export_rank is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "batch_size 6 is no multiple of micro_batch_size 4"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": True}, "seed is True"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"rank_pattern": 5}, "rank_pattern is 5; give q_proj=8,v_proj=4, or in YAML lines of the form"),
        ({"data_split": 5}, "data_split is 5; give a name"),
        ({"trainable_token_indices": "3, x"}, "trainable_token_indices is '3, x'; give token ids separated by commas"),
        ({"trainable_token_indices": 5}, "trainable_token_indices is 5; give token ids"),
        ({"trainable_token_indices": {"embed": 5}}, "trainable_token_indices is {'embed': 5}; give token ids"),
        ({"trainable_token_indices": [3, -1]}, "the token ids of trainable_token_indices are (3, -1); give whole"),
        ({"trainable_token_indices": {"embed": [3, 3]}}, "the token ids of embed are (3, 3); give whole"),
        ({"method": "full", "trainable_token_indices": [3]}, "leave out trainable_token_indices"),
        ({"modules_to_save": 5}, "modules_to_save is 5; give a list of names"),
        ({"method": "full", "modules_to_save": "lm_head"}, "leave out modules_to_save"),
        ({"target_modules": "("}, "target_modules is no regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"method": "full", "export_rank": 4, "alpha": 8}, "leave out alpha, export_rank"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_right_is_refused_by_name(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        recipe_from(setting)
    assert "\n" not in str(caught.value)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size 8 is no multiple of micro_batch_size 2 times 3 processes"):
        training_arguments(Recipe(batch_size=8, micro_batch_size=2), tmp_path)
