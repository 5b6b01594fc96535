"""What a run cannot use is said in one line, before a model is loaded."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import ConfigError, MissingExtraError
from pissa.training.engine import training_arguments
from pissa.training.packages import check_packages
from pissa.training.recipe import Recipe

PACKAGES = {"lomo": "lomo_optim", "galore_adamw": "galore_torch", "schedule_free_adamw": "schedulefree"}


@pytest.mark.parametrize("optimizer", PACKAGES)
def test_an_optimizer_whose_package_is_missing_is_refused(optimizer: str, tmp_path: Path) -> None:
    if find_spec(PACKAGES[optimizer]) is not None:
        pytest.skip("the package is installed")
    with pytest.raises(MissingExtraError, match="install") as caught:
        training_arguments(Recipe(optimizer=optimizer), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adam_beta2": 5}, "Invalid beta parameter"),
        ({"adam_epsilon": -1}, "Invalid epsilon"),
        ({"dataloader_num_workers": -1}, "num_workers"),
        ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
        ({"optim_args": "momentum"}, "unpack|optim_args"),
    ],
)
def test_values_that_optimizer_schedule_and_loader_do_not_take_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"training: .*{said}"):
        training_arguments(Recipe(training=settings), tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "spectral"])
def test_what_can_be_used_is_taken(optimizer: str, tmp_path: Path) -> None:
    settings = {"lr_scheduler_kwargs": {"num_cycles": 0.4}, "dataloader_num_workers": 1}
    assert training_arguments(Recipe(optimizer=optimizer, training=settings), tmp_path).dataloader_num_workers == 1


def test_packages_are_looked_for_without_importing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(Recipe())
    monkeypatch.setattr("pissa.training.packages.find_spec", lambda _: None)
    said = (
        "training needs a package: pip install 'pissa[train]'; report_to wandb needs a package: pip install wandb; "
        "liger needs a package: pip install liger-kernel; attention flash_attention_2 needs a package: pip install "
        "flash-attn"
    )
    with pytest.raises(MissingExtraError, match=re.escape(said)):
        check_packages(Recipe(report_to=("wandb",), liger=True, attention="flash_attention_2"))
    with pytest.raises(MissingExtraError, match=r"^quantize nf4 needs a package: pip install 'pissa\[quant\]'$"):
        check_packages(Recipe(quantize="nf4"), trains=False)
    check_packages(Recipe(quantize="gptq"), trains=False)
