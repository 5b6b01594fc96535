"""Every method of the literature, from the command's settings to a result that plain PEFT loads on the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, in_process, log_of, plain_logits, recipe, result_tensors, run, write_rows
from transformers import AutoModelForCausalLM

from pissa import export_lora, export_merged, load, reference
from pissa.errors import ConfigError
from pissa.training.recipe import Recipe
from tiny import largest_difference, logits_of, same_tensors, tiny_llama

METHODS: dict[str, dict[str, Any]] = {
    "random-pissa": {"method": "random-pissa", "random_fraction": 0.5},
    "cura": {"method": "cura", "cur_rcond": 0.01},
    "robust-pissa": {"method": "robust-pissa"},
    "minor": {"component": "minor"},
    "scored": {"component": "scored", "scored_examples": 6},
    "dora": {"method": "dora"},
    "pissa+dora": {"method": "pissa+dora"},
    "adalora": {"method": "adalora"},
    "pissa+adalora": {"method": "pissa+adalora", "orthogonality": 0.1},
    "lora+": {"method": "lora", "loraplus_ratio": 8.0},
    "pissa+dora in offset": {"method": "pissa+dora", "placement": "offset"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_in_an_adapter_for_the_base_and_continues_to_the_same_losses(
    name: str, base_directory: Path, tmp_path: Path
) -> None:
    settings = {**METHODS[name], "max_steps": 4}
    whole = run(base_directory, tmp_path / "whole", recipe(**settings))
    trained = logits_of(whole.model)
    assert largest_difference(trained, logits_of(tiny_llama())) > 1e-4
    assert largest_difference(plain_logits(base_directory, tmp_path / "whole"), trained) < 1e-5
    document = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert document["peft_type"] == "LORA" and document["use_dora"] == ("dora" in name)

    state = tmp_path / "whole" / "state"
    for directory in (tmp_path / "whole", state / "checkpoint-4"):
        loaded = load(directory)
        assert largest_difference(logits_of(loaded), trained) < 1e-5
        with reference(loaded):
            assert largest_difference(logits_of(loaded), logits_of(tiny_llama())) < 1e-5
    # stopped after the second step, and continued
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "state" / "checkpoint-4")
    for file in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "again" / file).unlink()
    run(base_directory, tmp_path / "again", recipe(**settings))
    assert log_of(tmp_path / "again") == log_of(tmp_path / "whole")
    assert same_tensors(result_tensors(tmp_path / "again"), result_tensors(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["pissa+dora", "pissa+adalora"])
def test_runs_export_at_any_rank_and_merged(name: str, base_directory: Path, tmp_path: Path) -> None:
    result = run(base_directory, tmp_path / "run", recipe(**METHODS[name], max_steps=3))
    trained = logits_of(result.model)
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert largest_difference(logits_of(merged), trained) < 1e-5
    export = export_lora(tmp_path / "run", tmp_path / "full rank", rank=8)
    assert max(export.errors.values()) < 1e-3
    assert largest_difference(plain_logits(base_directory, tmp_path / "full rank"), trained) < 1e-4


def test_the_logged_loss_is_the_data_s_and_the_penalty_still_acts(base_directory: Path, tmp_path: Path) -> None:
    def losses(weight: float) -> list[float]:
        settings = recipe(method="pissa+adalora", orthogonality=weight, max_steps=5, micro_batch_size=2)
        return run(base_directory, tmp_path / f"{weight}", settings).results["losses"]

    free, held = losses(0.0), losses(5.0)
    assert free[0] == held[0] and free[-1] != held[-1]

    def deviation(weight: float) -> float:
        model = load(tmp_path / f"{weight}" / "state" / "checkpoint-5")
        factors = [p.detach() for n, p in model.named_parameters() if "lora_A.default" in n]
        return max(float((A @ A.mT - torch.eye(4)).norm()) for A in factors)

    assert deviation(5.0) < 0.7 * deviation(0.0)


def test_the_command_line_knows_the_methods(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    settings = recipe(component="scored", scored_examples=5, loraplus_ratio=2.0, max_steps=1)
    done = in_process([*arguments(base_directory, data, tmp_path / "run", settings), "--json"], capsys)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["component"] == "scored"
    given = [*arguments(base_directory, data, tmp_path / "no", recipe(method="cura")), "--quantize", "nf4"]
    wrong = in_process(given, capsys)
    assert wrong.returncode == 2 and "method 'cura' cannot be quantised" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "pissa+dora", "quantize": "nf4"}, "use_dora scales rows by the norms of the weight"),
        ({"method": "pissa+adalora", "quantize": "nf4"}, "use_adalora does not go with quantization"),
        ({"method": "pissa+adalora", "placement": "offset"}, 'use_adalora does not go with placement "offset"'),
        ({"method": "adalora", "use_rslora": True}, "use_adalora does not go with use_rslora"),
        ({"method": "adalora", "rank_pattern": {"q_proj": 2}}, "use_adalora does not go with rank_pattern"),
        ({"method": "pissa", "orthogonality": 0.1}, "orthogonality is AdaLoRA's"),
        ({"method": "adalora", "orthogonality": -1.0}, "orthogonality is -1.0"),
        ({"loraplus_ratio": 0.5}, "loraplus_ratio is 0.5; give a number of at least 1"),
        ({"method": "full", "loraplus_ratio": 2.0}, "method full has no adapter: leave out loraplus_ratio"),
        ({"method": "full", "component": "minor"}, "leave out component"),
        ({"scored_examples": 3}, 'scored_examples is for component "scored"'),
    ],
)
def test_combinations_that_cannot_be_right_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")) as caught:
        Recipe(**settings)
    assert "\n" not in str(caught.value)
