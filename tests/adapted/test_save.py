"""What PEFT's own methods save of an adapted model is right on the base, and continues its run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pissa import PissaConfig, Quantization, adapt, export_lora, export_merged, load, reference, restore, save_residual
from pissa.errors import CheckpointError, PissaError
from pissa.live.quantized import keep_unpacked
from pissa.live.state import INITIAL
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_llama, token_batch, train_steps

NOISE = 2e-6
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pissa.json"}
SETTINGS: dict[str, dict[str, Any]] = {
    "residual": {},
    "offset": {"placement": "offset"},
    "lora": {"method": "lora-kaiming"},
    "dora": {"use_dora": True},
    "adalora": {"use_adalora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9.0}, "alpha": 2.0},
    "rslora": {"use_rslora": True, "alpha": 3.0, "rank_pattern": {"q_proj": 2}},
    "in full": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [*range(100, 200)]},
    "tokens, offset": {"trainable_token_indices": [*range(100, 200)], "placement": "offset"},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=64).save_pretrained(directory)
    return directory


def from_disk(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def trained(base: Path, steps: int = 3, **settings: Any) -> PeftModel:
    model = adapt(from_disk(base), PissaConfig(4, **settings))
    train_steps(model, steps)
    return model.eval()


def on_base(base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT alone makes of it."""
    return logits_of(PeftModel.from_pretrained(from_disk(base), str(adapter)))


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@every_setting
def test_a_saved_model_is_the_trained_one_on_the_untouched_base(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = trained(base, **settings)
    before = snapshot(model)
    model.save_pretrained(str(tmp_path))
    assert files(tmp_path) == FILES
    assert largest_difference(logits_of(model), logits_of(from_disk(base))) > 1e-3
    assert largest_difference(on_base(base, tmp_path), logits_of(model)) < NOISE
    assert same_tensors(snapshot(model), before)


@every_setting
def test_a_saved_adapter_goes_back_into_its_model_in_place(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = trained(base, **settings)
    model.save_pretrained(str(tmp_path))
    saved, held = snapshot(model), {name: id(p) for name, p in model.named_parameters()}
    train_steps(model.train(), 2)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert model.training and same_tensors(snapshot(model), saved)
    assert held == {name: id(p) for name, p in model.named_parameters()}
    model.load_adapter(str(tmp_path), "default")
    assert not model.training


@pytest.mark.parametrize(("placement", "tie"), [("residual", False), ("residual", True), ("offset", False)])
def test_trained_tokens_are_exported_merged_and_given_back(tmp_path: Path, tie: bool, placement: Any) -> None:
    tiny_llama(tie=tie).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", placement=placement, trainable_token_indices=[*range(100, 200)])
    expected = logits_of(model)
    rows: Any = from_disk(tmp_path / "base").model.embed_tokens.weight
    export_merged(model, tmp_path / "live")
    export_lora(model, tmp_path / "lora")
    export_merged(tmp_path / "lora", tmp_path / "saved")
    for place in ("live", "saved"):
        merged = from_disk(tmp_path / place)
        assert largest_difference(logits_of(merged), expected) < NOISE
        changed = (merged.model.embed_tokens.weight != rows).any(1).nonzero().flatten()
        assert changed.numel() > 0 and int(changed.min()) >= 100 and int(changed.max()) < 200
        assert merged.config.tie_word_embeddings == tie
    with reference(model):
        assert largest_difference(logits_of(model), logits_of(from_disk(tmp_path / "base"))) < NOISE
    plain = restore(model)
    assert largest_difference(logits_of(plain), logits_of(from_disk(tmp_path / "base"))) < NOISE
    assert snapshot(plain).keys() == snapshot(from_disk(tmp_path / "base")).keys()


def test_saving_again_replaces_what_was_there(base: Path, tmp_path: Path) -> None:
    model = trained(base, quantization=Quantization(iterations=1))
    model.save_pretrained(str(tmp_path))
    first = files(tmp_path)
    train_steps(model.train(), 2)
    model.eval().save_pretrained(str(tmp_path))
    assert files(tmp_path) == first
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


def test_a_quantised_model_is_saved_with_its_residual(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = trained(base, quantization=Quantization(iterations=1))
    model.save_pretrained(str(tmp_path / "out"))
    weights = {"config.json", "generation_config.json", "model.safetensors", "pissa.json", "README.md"}
    initial = {f"{INITIAL}/adapter_config.json", f"{INITIAL}/adapter_model.safetensors"}
    assert files(tmp_path / "out") == FILES | {f"residual/{name}" for name in weights | initial}
    shutil.move(tmp_path / "out", tmp_path / "moved")
    again = load(tmp_path / "moved", is_trainable=True)
    assert torch.equal(logits_of(again.eval()), logits_of(model))
    assert train_steps(again.train(), 2) == train_steps(model.train(), 2)
    residual = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/moved/residual")
    keep_unpacked(residual)
    model.load_adapter(str(tmp_path / "moved"), "default")
    assert torch.equal(logits_of(PeftModel.from_pretrained(residual, str(tmp_path / "moved"))), logits_of(model))


def test_a_residual_that_was_saved_already_is_not_saved_again(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = trained(base, quantization=Quantization(iterations=1))
    save_residual(model, tmp_path / "residual")
    model.save_pretrained(str(tmp_path / "adapter"))
    assert files(tmp_path / "adapter") == FILES
    assert json.loads((tmp_path / "adapter" / "pissa.json").read_text())["residual"] == "../residual"
    assert torch.equal(logits_of(load(tmp_path / "adapter")), logits_of(model))


def test_every_adapter_is_saved_as_one_for_the_base(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    train_steps(model.train(), 2)
    second = logits_of(model.eval())
    model.save_pretrained(str(tmp_path / "all"))
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["default"])
    assert files(tmp_path / "all") == FILES | {f"second/{name}" for name in FILES} and files(tmp_path / "one") == FILES
    assert largest_difference(on_base(base, tmp_path / "all" / "second"), second) < NOISE
    model.set_adapter("default")
    for place in ("all", "one"):
        assert largest_difference(on_base(base, tmp_path / place), logits_of(model)) < NOISE
    for wrong in ("third", INITIAL):
        with pytest.raises(PissaError, match=wrong):
            model.save_pretrained(str(tmp_path / "none"), selected_adapters=[wrong])
    assert not (tmp_path / "none").exists()


def test_a_merged_adapter_and_options_that_mean_something_else_are_refused(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    with pytest.raises(PissaError, match="safetensors"):
        model.save_pretrained(str(tmp_path / "out"), safe_serialization=False)
    model.merge_adapter()
    with pytest.raises(PissaError, match="unmerge_adapter"):
        model.save_pretrained(str(tmp_path / "out"))
    assert files(tmp_path) == set()


def test_an_adapter_that_started_elsewhere_is_not_taken_over(base: Path, tmp_path: Path) -> None:
    trained(base).save_pretrained(str(tmp_path / "saved"))
    other = adapt(from_disk(base), PissaConfig(4, component="minor"))
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"pissa\.load"):
        other.load_adapter(str(tmp_path / "saved"), "default")
    assert same_tensors(snapshot(other), before)


def test_the_start_of_another_machine_is_the_same_up_to_rounding(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    model.save_pretrained(str(tmp_path / "saved"))
    other = adapt(from_disk(base), PissaConfig(4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if f".{INITIAL}." in name:
                parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    other.load_adapter(str(tmp_path / "saved"), "default")
    assert largest_difference(logits_of(other), logits_of(model)) < NOISE


@pytest.mark.parametrize("settings", [{}, {"placement": "offset"}, {"modules_to_save": ["norm"]}])
def test_trainer_s_best_model_and_its_checkpoints_are_for_the_base(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = [{"input_ids": row, "labels": row} for seed in range(6) for row in token_batch(seed)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=6, save_steps=1, eval_steps=1, eval_strategy="steps",
        per_device_train_batch_size=2, learning_rate=1e-2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, report_to=[], disable_tqdm=True, log_level="error",
    )  # fmt: skip
    model = adapt(from_disk(base), PissaConfig(4, **settings))
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[-4:])  # pyright: ignore
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-1"  # for the loss falls
    assert largest_difference(on_base(base, best), logits_of(model)) < 1e-4
    assert float(trainer.evaluate()["eval_loss"]) == pytest.approx(trainer.state.best_metric, rel=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    assert largest_difference(on_base(base, tmp_path / "final"), logits_of(model)) < 1e-4


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the place of the hub: `hub / repository / ...` is what was uploaded."""

    def create_repo(_: HfApi, repo_id: str, **__: Any) -> Any:
        (tmp_path / "hub" / f"me/{repo_id}").mkdir(parents=True, exist_ok=True)
        return type("Url", (), {"repo_id": f"me/{repo_id}"})()

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Any, commit_message: str, **__: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
        return commit_message

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub" / "me"


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_what_is_pushed_is_the_trained_model_on_the_base(base: Path, hub: Path, placement: Any) -> None:
    model = trained(base, placement=placement)
    info = model.push_to_hub("mine", commit_message="First", private=True, tags=["maths"])
    assert info == "First" and files(hub / "mine") == FILES
    assert largest_difference(on_base(base, hub / "mine"), logits_of(model)) < NOISE
    card = ModelCard.load(hub / "mine" / "README.md")
    assert card.data["library_name"] == "peft" and card.data["tags"] == ["maths", "pissa", "lora"]
    assert card.data.get("base_model") is None  # the hub refuses directories
    assert str(base) in card.text and "method: pissa, rank 4" in card.text and "error: none" in card.text


def test_a_quantised_model_is_pushed_with_its_residual_wherever_that_lies(
    base: Path, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    model = trained(base, quantization=Quantization(iterations=1))
    save_residual(model, tmp_path / "residual")
    model.push_to_hub("mine")
    assert {name for name in files(hub / "mine") if "/" not in name} == FILES
    shutil.rmtree(tmp_path / "residual")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(hub.parent / name))
    assert torch.equal(logits_of(load("me/mine")), logits_of(model))
    card = ModelCard.load(hub / "mine" / "README.md").text
    assert 'place + "/residual"' in card and "method: qpissa, rank 4" in card


def test_cards_name_a_base_that_the_hub_knows_and_the_error_that_a_rank_costs(tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(4))
    train_steps(model, 2)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "org/base"
    export = export_lora(model, tmp_path / "small", rank=2)
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data["base_model"] == "org/base" and 'from_pretrained("org/base")' in card.text
    assert f"{max(export.errors.values()):.2e} at most" in card.text and "LoRA of rank 2" in card.text
    # of a saved adapter all of that is still known
    export_lora(model, tmp_path / "lossless")
    export_lora(tmp_path / "lossless", tmp_path / "again", rank=2)
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "small" / "README.md").read_text()


def test_a_loaded_model_is_saved_as_it_was(base: Path, tmp_path: Path) -> None:
    trained(base).save_pretrained(str(tmp_path / "first"))
    loaded = load(tmp_path / "first")
    loaded.save_pretrained(str(tmp_path / "second"))
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    with reference(loaded):
        assert largest_difference(logits_of(loaded), logits_of(from_disk(base))) < 1e-5
