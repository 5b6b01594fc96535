"""What was saved is what is loaded, without any decomposition, and a damaged directory is refused by name."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from families import FAMILIES, logits
from pissa import PissaConfig, adapt, export_lora, load, reference, restore, save_residual
from pissa.adapted.save import AdaptedSaving
from pissa.checkpoint.read import read_adapter
from pissa.checkpoint.source.load import check_model_directory, load_base, load_tokenizer
from pissa.checkpoint.source.names import looks_like_path
from pissa.config import METHODS, Method
from pissa.errors import CheckpointError
from pissa.live.state import INITIAL, TRAINABLE, adapter_factors
from sampled import thinned
from tiny import (
    largest_difference,
    logits_of,
    same_tensors,
    save_by_peft_alone,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    token_batch,
    train_steps,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9.0}, "alpha": 2.0},
    "rslora": {"use_rslora": True, "alpha": 3.0, "rank_pattern": {"q_proj": 2}},
    "in full": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a matrix was decomposed")

    for owner, names in (
        (torch.linalg, ("svd", "svdvals", "eigh", "qr")),
        (torch, ("svd", "svd_lowrank", "pca_lowrank", "qr")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)


def from_disk(directory: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def trained(base: Path, **settings: Any) -> PeftModel:
    model = adapt(from_disk(base), PissaConfig(4, **settings))
    train_steps(model)
    return model


def saved_by_peft(model: PeftModel, directory: Path) -> None:
    """As PEFT alone would save it, and pissa once did: the rank-r adapter, and `pissa_init/` beside it."""
    save_by_peft_alone(model, directory)


SAVED: dict[str, Callable[..., Any]] = {"us": AdaptedSaving.save_pretrained, "peft": saved_by_peft}


# Saved and loaded


@pytest.mark.parametrize(
    ("method", "settings", "saved_by"),
    thinned(METHODS, product(SETTINGS, SAVED), always=[("plain", "us")], whole=["pissa", "lora-kaiming"]),
)
def test_a_saved_model_is_loaded_bit_for_bit(
    base: Path, tmp_path: Path, method: Method, settings: str, saved_by: str, request: pytest.FixtureRequest
) -> None:
    model = trained(base, method=method, **SETTINGS[settings])
    SAVED[saved_by](model, tmp_path)
    request.getfixturevalue("no_decomposition")
    loaded = load(tmp_path)
    assert same_tensors(snapshot(loaded), snapshot(model))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with reference(loaded):
        allowed = 0 if method.startswith("lora-") else 1e-5
        assert largest_difference(logits_of(loaded), logits_of(from_disk(base))) <= allowed
    again = load(tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_lossless_export_holds_the_whole_adapted_model(
    base: Path, tmp_path: Path, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = trained(base, **settings)
    export_lora(model, tmp_path / "export")
    request.getfixturevalue("no_decomposition")
    loaded = load(tmp_path / "export")
    assert same_tensors(snapshot(loaded), snapshot(model))
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_residual_is_computed_again_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_gpt2(dtype=dtype).save_pretrained(tmp_path / "base")
    model = adapt(from_disk(tmp_path / "base"), PissaConfig(4))
    train_steps(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert same_tensors(snapshot(load(tmp_path / "adapter")), snapshot(model))


def test_peft_s_fast_pissa_is_decomposed_again_on_loading_and_ours_is_not(base: Path, tmp_path: Path) -> None:
    fast: Any = "pissa_niter_1"
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=fast)
    theirs = get_peft_model(from_disk(base), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    reloaded = PeftModel.from_pretrained(from_disk(base), str(tmp_path / "theirs"))
    assert largest_difference(logits_of(reloaded), logits_of(theirs)) > 1e-4

    ours = adapt(from_disk(base), PissaConfig(8, target_modules=["q_proj", "v_proj"]))
    ours.save_pretrained(str(tmp_path / "ours"))
    assert torch.equal(logits_of(load(tmp_path / "ours")), logits_of(ours))


@pytest.mark.filterwarnings("ignore:untied")
@pytest.mark.parametrize("method", METHODS)
def test_a_tied_base_with_an_adapted_head_is_saved_and_loaded(tmp_path: Path, method: Method) -> None:
    tiny_llama(tie=True).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", target_modules=["lm_head", "q_proj"], method=method)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded: Any = load(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))
    embedding = loaded.get_base_model().model.embed_tokens.weight
    assert torch.equal(embedding, from_disk(tmp_path / "base").model.embed_tokens.weight)

    by_peft = PeftModel.from_pretrained(from_disk(tmp_path / "base"), str(tmp_path / "adapter"))
    assert largest_difference(logits_of(by_peft), logits_of(model)) < 1e-5


def test_a_base_at_hand_is_used_instead_of_the_recorded_one(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    model.save_pretrained(str(tmp_path / "adapter"))
    shutil.copytree(base, tmp_path / "moved")
    for name in ("adapter_config.json", "pissa.json"):
        file = tmp_path / "adapter" / name
        file.write_text(file.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match="gone does not exist"):
        load(tmp_path / "adapter")
    for given in (tmp_path / "moved", str(tmp_path / "moved"), tiny_llama()):
        assert torch.equal(logits_of(load(tmp_path / "adapter", given)), logits_of(model))


# Continued


def test_training_goes_on_after_loading_as_if_it_had_not_stopped(base: Path, tmp_path: Path) -> None:
    def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = adapt(from_disk(base), PissaConfig(4))
    optimizer = optimizer_of(model)
    train_steps(model, 3, optimizer=optimizer)
    model.save_pretrained(str(tmp_path / "plain"))
    export_lora(model, tmp_path / "export")
    state = copy.deepcopy(optimizer.state_dict())
    expected = train_steps(model, 3, first=3, optimizer=optimizer)
    for name in ("plain", "export"):
        continued = load(tmp_path / name, is_trainable=True)
        optimizer = optimizer_of(continued)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert train_steps(continued, 3, first=3, optimizer=optimizer) == expected
        assert same_tensors(snapshot(continued), snapshot(model))


def test_a_plain_trainer_checkpoint_is_loaded_and_continued(
    base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows = [{"input_ids": row, "labels": row} for seed in range(6) for row in token_batch(seed)]

    def trainer(model: PeftModel) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], disable_tqdm=True, log_level="error",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]

    def losses(run: Trainer) -> list[float]:
        return [record["loss"] for record in run.state.log_history if "loss" in record]

    through = trainer(adapt(from_disk(base), PissaConfig(4)))
    through.train()
    finished: Any = through.model
    halfway = tmp_path / "checkpoint-2"
    again = adapt(from_disk(base), PissaConfig(4))
    request.getfixturevalue("no_decomposition")
    last = load(tmp_path / "checkpoint-4")
    assert torch.equal(logits_of(last), logits_of(finished))
    for start in (load(halfway, is_trainable=True), again):
        resumed = trainer(start)
        resumed.train(resume_from_checkpoint=str(halfway))
        assert losses(resumed) == losses(through)
        assert same_tensors(snapshot(start), snapshot(finished))


# Damaged adapters


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT alone saves in `plain/` and a lossless export in `export/`."""
    directory = tmp_path_factory.mktemp("saved")
    model = trained(base)
    saved_by_peft(model, directory / "plain")
    export_lora(model, directory / "export")
    return directory


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_one_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def drop_a_row(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors[name] = tensors[name][1:].contiguous()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: truncate(d / "adapter_model.safetensors"), "not a whole safetensors file"),
    "garbage": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x00" * 64), "not a whole safetensors file"),
    "empty file": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), r"adapter_config\.json is not valid JSON"),
    "not text": (
        lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        r"adapter_config\.json is not valid JSON",
    ),
    "not an object": (lambda d: (d / "adapter_config.json").write_text("[]"), "holds a JSON list instead of an object"),
    "no type": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds a None adapter"),
    "IA3": (lambda d: edit_config(d, peft_type="IA3"), "holds a IA3 adapter"),
    "AdaLoRA": (lambda d: edit_config(d, peft_type="ADALORA"), "not a PEFT configuration: AdaLoRA"),
    "DoRA": (lambda d: edit_config(d, use_dora=True), r"lora_A/lora_B pair, with lora_magnitude_vector"),
    "lora_bias": (lambda d: edit_config(d, lora_bias=True), "lora_bias"),
    "missing B": (lambda d: edit_weights(d, drop_one_b), r"lora_A/lora_B pair for model\.layers\.1\.mlp\.up_proj"),
    "ranks differ": (lambda d: edit_weights(d, drop_a_row), r"do not fit.*model\.layers\.1\.mlp\.up_proj"),
    "other rank": (lambda d: edit_config(d, r=6), r"do not fit.*adapter_config\.json"),
    "nothing": (lambda d: edit_weights(d, dict.clear), "no complete lora_A/lora_B pair"),
    "embedding": (
        lambda d: edit_weights(d, lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(2, 2)})),
        r"no complete lora_A/lora_B pair for embed",
    ),
    "empty directory": (lambda d: (shutil.rmtree(d), d.mkdir()), "has no adapter_config.json"),
    "missing directory": (shutil.rmtree, "is not a directory"),
}


@pytest.mark.parametrize("layout", ["plain", "export"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(
    saved: Path, tmp_path: Path, layout: str, damage: Callable[[Path], object], said: str
) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(saved / layout, directory)
    damage(directory)
    for reader in (read_adapter, load, export_lora):
        with pytest.raises(CheckpointError, match=said) as caught:
            reader(directory)
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_manifest_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(saved / "export", tmp_path / "adapter")
    (tmp_path / "adapter" / "pissa.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"pissa\.json"):
        load(tmp_path / "adapter")


def test_a_start_of_another_run_is_refused(saved: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "plain", tmp_path / "adapter")
    others: list[dict[str, Any]] = [{"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}}]
    for settings in others:
        saved_by_peft(adapt(from_disk(base), PissaConfig(4, **settings)), tmp_path / "other")
        shutil.rmtree(tmp_path / "adapter" / INITIAL)
        shutil.move(tmp_path / "other" / INITIAL, tmp_path / "adapter" / INITIAL)
        with pytest.raises(CheckpointError, match="not of one run"):
            load(tmp_path / "adapter")


def test_an_adapter_that_fits_only_an_unknown_residual_is_refused(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(from_disk(base), config).save_pretrained(str(tmp_path))
    for reader in (load, export_lora):
        with pytest.raises(CheckpointError, match=r"'pissa'.*path_initial_model_for_weight_conversion"):
            reader(tmp_path)


def test_an_adapter_is_refused_on_another_base(saved: Path) -> None:
    wider: Any = tiny_llama()
    wider.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 65)
    for other in (tiny_gpt2(), wider):
        before = snapshot(other)
        with pytest.raises(CheckpointError, match=r"another base: .*model\.layers\.0\.mlp\.up_proj"):
            load(saved / "plain", other)
        assert same_tensors(before, snapshot(other))


def test_a_foreign_lora_is_loaded_as_it_is(base: Path, tmp_path: Path) -> None:
    theirs = get_peft_model(from_disk(base), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], use_rslora=True))
    train_steps(theirs)
    theirs.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(theirs))
    assert adapter_factors(loaded)["model.layers.0.self_attn.q_proj"].A0 is None
    assert list(loaded.peft_config) == [TRAINABLE]


# Damaged bases


def test_a_model_directory_that_is_incomplete_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert largest_difference(logits_of(load_base(tmp_path / "sharded")), logits_of(model)) == 0
    for shard in (shards[0], shards[2]):
        shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 2 shard.*{shards[0].name}.*{shards[2].name}"):
        load_base(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index"):
        load_base(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), "is empty"),
        (lambda d: d.write_text("x"), "is a file"),
        (lambda d: (d.mkdir(), (d / "model.safetensors").touch()), "has no config.json"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{}")), "no weights"),
        (lambda d: (tiny_llama().save_pretrained(d), truncate(d / "model.safetensors")), "is not whole"),
        (
            lambda d: (tiny_llama().save_pretrained(d), (d / "config.json").write_text("{")),
            "json is not valid JSON",
        ),
        (lambda d: (tiny_llama().save_pretrained(d), (d / "config.json").write_text("{}")), "cannot load"),
    ],
    ids=["missing", "empty", "file", "no config", "no weights", "truncated", "config not JSON", "unknown kind"],
)
def test_what_is_no_model_directory_is_refused_by_name(
    tmp_path: Path, prepare: Callable[[Path], object], said: str
) -> None:
    prepare(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_base(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "no-such-model"])
def test_a_hub_id_that_cannot_be_loaded_is_one_clear_line(name: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not looks_like_path(name)
    check_model_directory(name)
    for load_it in (load_base, load_tokenizer):
        expected = f"^there is no directory {name}, and as a hub id it cannot be loaded: "
        with pytest.raises(CheckpointError, match=expected) as caught:
            load_it(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./model", "/model", "~/model", "a/b/c", "model/", "../model"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(name: str) -> None:
    assert looks_like_path(name)


@pytest.mark.parametrize("what", ["missing", "mismatched"])
def test_a_base_that_lacks_weights_is_refused_by_their_names(tmp_path: Path, what: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    up, down = (f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj"))
    if what == "missing":
        del tensors[up], tensors[down]
        expected = rf"{re.escape(down)} is missing, {re.escape(up)} is missing; download it again"
    else:
        tensors[up] = tensors[up][:-1].clone()
        expected = rf"config.json asks for: {re.escape(up)} is \(63, 32\) and not \(64, 32\)"
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_base(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tied_base_lacks_nothing(tmp_path: Path) -> None:
    for name, model in {"llama": tiny_llama(tie=True), "gpt2": tiny_gpt2()}.items():
        model.save_pretrained(tmp_path / name)
        assert largest_difference(logits_of(load_base(tmp_path / name)), logits_of(model)) == 0


def test_a_tokenizer_gets_a_padding_token_and_needs_an_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no-pad")
    assert load_tokenizer(tmp_path / "no-pad").pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no-end")
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "no-end")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path, placement: Any) -> None:
    base = tiny_llama(dtype=torch.float32)
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    model.save_pretrained(str(tmp_path / "state"))
    export_lora(model, tmp_path / "export")
    export_lora(tmp_path / "state", tmp_path / "again")
    for saved in ("state", "export", "again"):
        with pytest.raises(CheckpointError, match="another base than the one given"):
            load(tmp_path / saved, tiny_llama(seed=1))
        load(tmp_path / saved, tiny_llama(dtype=torch.bfloat16))  # the same in another dtype
        load(tmp_path / saved, restore(adapt(tiny_llama(), PissaConfig(8))))  # or up to rounding
        load(tmp_path / saved, base if saved == "again" else tiny_llama())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "qwen-moe", "gpt-2-embeddings", "bert-embeddings"])
def test_residuals_of_every_kind_are_saved_and_loaded(tmp_path: Path, family: str) -> None:
    case = FAMILIES[family]
    batch = case.batch()
    model = adapt(case.make(), PissaConfig(2, target_modules=case.targets))
    expected = logits(model, batch)
    save_residual(model, tmp_path / "residual")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(1.1)
    trained = logits(model, batch)
    model.save_pretrained(str(tmp_path / "trained"), save_embedding_layers=False)
    plain = case.model.from_pretrained(tmp_path / "residual").eval()
    plain = PeftModel.from_pretrained(plain, tmp_path / "residual", subfolder="pissa_init")
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-4, atol=1e-5)
    again = load(tmp_path / "trained", case.model.from_pretrained(tmp_path / "residual")).eval()
    torch.testing.assert_close(logits(again, batch), trained, rtol=1e-4, atol=1e-5)
    with reference(again):
        torch.testing.assert_close(logits(again, batch), expected, rtol=1e-4, atol=1e-5)
