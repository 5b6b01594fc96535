"""Whoever changes a directory and seals it again, as one can without a key, is found out by the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streaming import CONFIG, llama_on_disk

from pissa import init_checkpoint, verify
from pissa.checkpoint.seal import described, sealed
from pissa.errors import CheckpointError

MODULE = "model.layers.0.mlp.up_proj"
ADAPTER = "pissa_init/adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, what was made of it)."""
    folder = tmp_path_factory.mktemp("made")
    base = llama_on_disk(folder / "base")
    init_checkpoint(base, folder / "out", CONFIG)
    return base, folder / "out"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def changed_tensors(file: Path, change: Any) -> None:
    """Change the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def changed_json(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def noise(key: str) -> Any:
    """Another weight of somebody's own."""
    return lambda out: changed_tensors(
        out / "model.safetensors", lambda tensors: tensors.update({key: torch.randn_like(tensors[key])})
    )


def nothing(_: Any) -> None:
    """No change."""


def with_head(tensors: dict[str, Any]) -> None:
    """An adapter of a module that was not split."""
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(2, 32)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(64, 2)


# name: (change of the files, change of the manifest, what is said)
SEALED_AGAIN: dict[str, tuple[Any, Any, str]] = {
    "a weight": (noise(f"{MODULE}.weight"), nothing, r"residual \+ adapter is off by"),
    "a weight, its module taken out": (
        noise(f"{MODULE}.weight"), lambda m: m["modules"].pop(MODULE), f"does not list the module {MODULE}"),
    "a weight, called a copy": (
        noise(f"{MODULE}.weight"), lambda m: m["copies"].update({f"{MODULE}.weight": f"{MODULE}.weight"}),
        "lists the copy"),
    "a weight, the error stated": (
        noise(f"{MODULE}.weight"), lambda m: m["modules"][MODULE].update(rounding=99.0), "an error of 99 is stated"),
    "a norm": (noise("model.norm.weight"), nothing, "is not a copy of the base's"),
    "a norm, taken out of copies": (
        noise("model.norm.weight"), lambda m: m["copies"].pop("model.norm.weight"), "does not list the copy"),
    "a copy of another tensor": (
        nothing, lambda m: m["copies"].update({"model.norm.weight": "lm_head.weight"}), "lists the copy"),
    "a scale": (nothing, lambda m: m["modules"][MODULE].update(scale=1.01), r"scale: 1\.01 then, 1\.0 now"),
    "a rank": (nothing, lambda m: m["modules"][MODULE].update(rank=1), "rank: 1 then"),
    "other settings": (nothing, lambda m: m["config"].update(rank=3), "does not hold just the tensors"),
    "no settings": (nothing, lambda m: m.update(config=None), "does not hold|none that pissa init"),
    "settings of another kind": (nothing, lambda m: m["config"].update(rank="x"), "config is none that pissa init"),
    "a tensor of the base left out": (
        nothing, lambda m: m["base_tensors"].pop("lm_head.weight"), "does not list the tensor of the base"),
    "lora_alpha": (lambda o: changed_json(o / ADAPTER, lora_alpha=200), nothing, "lora_alpha: 4 then, 200 now"),
    "rsLoRA": (lambda o: changed_json(o / ADAPTER, use_rslora=True), nothing, "use_rslora"),
    "a rank pattern": (lambda o: changed_json(o / ADAPTER, rank_pattern={"up_proj": 2}), nothing, "rank_pattern"),
    "an alpha pattern": (lambda o: changed_json(o / ADAPTER, alpha_pattern={"up_proj": 9}), nothing, "alpha_pattern"),
    "an adapter's field of its own": (lambda o: changed_json(o / ADAPTER, own=1), nothing, "is no configuration"),
    "another kind of adapter": (lambda o: changed_json(o / ADAPTER, peft_type="IA3"), nothing, "peft_type"),
    "where a trained adapter lies": (nothing, lambda m: m.update(trained="pissa_init"), "has 'trained'"),
    "where its residual lies": (nothing, lambda m: m.update(residual="../other"), "has 'residual'"),
    "another method": (nothing, lambda m: m.update(method="lora"), "'lora'"),
    "another layout": (nothing, lambda m: m.update(layout="lossless"), "'lossless'"),
    "rms_norm_eps": (lambda o: changed_json(o / "config.json", rms_norm_eps=10.0), nothing, "rms_norm_eps"),
    "another model": (lambda o: changed_json(o / "config.json", model_type="mistral"), nothing, r"config\.json, "),
    "code": (lambda o: changed_json(o / "config.json", auto_map={"AutoModel": "a.B"}), nothing, "auto_map"),
    "an adapter that nobody lists": (
        lambda o: changed_tensors(o / "pissa_init/adapter_model.safetensors", with_head), nothing,
        "does not hold just the tensors"),
    "a tensor that nobody lists": (
        lambda o: changed_tensors(o / "model.safetensors", lambda t: t.update(own=torch.zeros(1))), nothing,
        "does not hold just the tensors"),
    "a file of its own": (lambda o: (o / "own.json").write_text("{}"), nothing, r"lists the file own\.json"),
    "a file left out": (lambda o: (o / "generation_config.json").unlink(), nothing, "does not list the file"),
    "another tokenizer": (
        lambda o: changed_json(o / "tokenizer_config.json", eos_token="a"), nothing, r"tokenizer_config\.json is not"),
    "a nested manifest": (
        lambda o: (o / "pissa_init/pissa.json").write_text("{}"), nothing, r"lists the file pissa_init/pissa\.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEALED_AGAIN)
def test_what_does_not_follow_from_the_base_is_refused(made: tuple[Path, Path], copy: Path, name: str) -> None:
    change, manifest, said = SEALED_AGAIN[name]
    change(copy)
    document = json.loads((copy / "pissa.json").read_text())
    (copy / "pissa.json").unlink()
    document["files"] = described(copy)
    manifest(document)
    (copy / "pissa.json").write_text(sealed({k: v for k, v in document.items() if k != "sha256"}))
    with pytest.raises(CheckpointError, match=said) as caught:
        verify(copy, made[0])
    assert "\n" not in str(caught.value)


def test_a_directory_that_was_moved_is_still_what_follows_from_the_base(made: tuple[Path, Path], copy: Path) -> None:
    assert verify(copy, made[0]).errors == verify(made[1], made[0]).errors


@pytest.mark.parametrize("place", ["pissa_init/pissa.json", "sub/pissa.json", "pissa_init/sub/more.txt"])
def test_a_file_below_is_a_file_like_any_other(copy: Path, place: str) -> None:
    (copy / place).parent.mkdir(exist_ok=True)
    (copy / place).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{place} is not in pissa.json"):
        verify(copy)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_field_of_any_kind_is_one_line_or_nothing(made: tuple[Path, Path], copy: Path, data: st.DataObject) -> None:
    """Under a right digest: whatever a field is replaced by, there is an answer and no traceback."""
    original = (made[1] / "pissa.json").read_text()
    document = json.loads(original)
    at, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(at[key], dict) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)))
    if data.draw(st.integers(0, 5)):
        at[key] = data.draw(values)
    else:
        del at[key]
    try:
        text = sealed({k: v for k, v in document.items() if k != "sha256"})
    except ValueError:  # NaN cannot be sealed
        return
    (copy / "pissa.json").write_text(text)
    try:
        verify(copy, made[0] if data.draw(st.integers(0, 4)) == 0 else None)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 20_000
