"""GGUF LoRAs: what the gguf reader finds in them is the trained change, under llama.cpp's names."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pissa import PissaConfig, adapt, export_lora
from pissa.errors import CheckpointError, ConfigError, OutputError, PissaError
from pissa.export.gguf_lora import ARCHITECTURES, interleaved_rows
from pissa.live.state import adapter_factors
from tiny import tiny_gpt2, tiny_llama, train_steps

gguf = pytest.importorskip("gguf")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"placement": "offset"},
    "rslora": {"use_rslora": True, "alpha": 3.0},
    "patterns": {"rank_pattern": {"0.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 9.0}, "alpha": 2.0},
    "lora": {"method": "lora-gaussian"},
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' names inside a Llama block -> llama.cpp's, by hand."""


def trained(model: Any = None, **settings: Any) -> PeftModel:
    adapted = adapt(model or tiny_llama(), PissaConfig(4, **settings))
    train_steps(adapted, 3)
    return adapted


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return values, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def applied(tensors: dict[str, Tensor], alpha: float, name: str) -> Tensor:
    """What llama.cpp adds to a weight: alpha / rank · lora_b · lora_a, the rank being that pair's own."""
    A, B = (tensors[f"{name}.weight.lora_{side}"].double() for side in "ab")
    assert A.shape[0] == B.shape[1]
    return alpha / B.shape[1] * (B @ A)


def in_transformers_order(rows: Tensor, heads: int) -> Tensor:
    """A projection's rows as transformers' own GGUF loader puts them back."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    return torch.from_numpy(LlamaTensorProcessor()._reverse_permute_weights(rows.numpy(), heads).copy())


def change(model: PeftModel, name: str) -> Tensor:
    f = adapter_factors(model)[name]
    product = f.B.double() @ f.A.double()
    if f.A0 is not None and f.B0 is not None:
        product = product - f.B0.double() @ f.A0.double()
    return f.scale * product


@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"tolerance": 0.2}], ids=["lossless", "rank", "tolerance"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_gguf_adds_what_training_changed(tmp_path: Path, settings: dict[str, Any], how: dict[str, Any]) -> None:
    model = trained(**settings)
    export = export_lora(model, tmp_path / "lora.gguf", format="gguf", **how)
    assert os.listdir(tmp_path) == ["lora.gguf"]
    values, tensors = read(tmp_path / "lora.gguf")
    assert (values["general.type"], values["adapter.type"], values["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    assert len(tensors) == 2 * len(NAMES) * 2
    for layer in range(2):
        for theirs, ours in NAMES.items():
            name = f"model.layers.{layer}.{theirs}"
            found = applied(tensors, values["adapter.lora.alpha"], f"blk.{layer}.{ours}")
            if ours in ("attn_q", "attn_k"):
                found = in_transformers_order(found, 4 if ours == "attn_q" else 2)
            expected = change(model, name)
            tolerance = 1e-6 + 1.001 * export.errors[name] * float(expected.norm())
            assert float((found - expected).norm()) <= tolerance


def test_interleaved_rows_take_the_halves_of_a_head_in_turn() -> None:
    rows = torch.arange(12.0)[:, None]  # two heads of six
    assert interleaved_rows(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_gpt2_s_transposed_layers_are_written_out_by_in(tmp_path: Path) -> None:
    model = trained(tiny_gpt2())
    export_lora(model, tmp_path / "lora.gguf", format="gguf")
    values, tensors = read(tmp_path / "lora.gguf")
    assert values["general.architecture"] == "gpt2"
    found = applied(tensors, values["adapter.lora.alpha"], "blk.1.attn_qkv")
    torch.testing.assert_close(found, change(model, "transformer.h.1.attn.c_attn"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "gpt2"])
def test_every_architecture_has_a_name_for_each_linear_layer(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, bos_token_id=1, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_config(config)
    adapted = adapt(model, PissaConfig(2))
    export_lora(adapted, tmp_path / "lora.gguf", format="gguf")
    values, tensors = read(tmp_path / "lora.gguf")
    assert len(tensors) == 2 * len(adapter_factors(adapted))
    assert values["general.architecture"] == {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)


def test_a_saved_run_needs_the_base_s_config_and_nothing_else_of_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = trained()
    export_lora(model, tmp_path / "live.gguf", format="gguf")
    export_lora(model, tmp_path / "lora")
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not record its base") as caught:
        export_lora(tmp_path / "lora", tmp_path / "saved.gguf", format="gguf")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"config\.json of the base"):
        export_lora(tmp_path / "lora", tmp_path / "saved.gguf", format="gguf", base=tmp_path / "nowhere")
    export_lora(tmp_path / "lora", tmp_path / "saved.gguf", format="gguf", base=base)
    assert (tmp_path / "saved.gguf").read_bytes() == (tmp_path / "live.gguf").read_bytes()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_embedding_of_an_untied_base_is_written_as_it_is_looked_up(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = trained(target_modules=["embed_tokens", "lm_head", "q_proj", "up_proj"], **settings)
    export_lora(model, tmp_path / "lora.gguf", format="gguf")
    values, tensors = read(tmp_path / "lora.gguf")
    # llama.cpp takes rows of lora_a by token and multiplies by lora_b; its rank is the second dimension of both
    A, B = (tensors[f"token_embd.weight.lora_{side}"].double() for side in "ab")
    assert A.shape[0] == 384 and A.shape[1] == B.shape[1]
    added = values["adapter.lora.alpha"] / B.shape[1] * (A @ B.T)
    torch.testing.assert_close(added, change(model, "model.embed_tokens").T, rtol=0, atol=1e-6)
    head = applied(tensors, values["adapter.lora.alpha"], "output")
    torch.testing.assert_close(head, change(model, "lm_head"), rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "in full": (tiny_llama, {"modules_to_save": ["norm"]}, r"model\.norm\.weight"),
    "tied head": (lambda: tiny_llama(tie=True), {"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "tied embedding": (lambda: tiny_llama(tie=True), {"target_modules": ["embed_tokens"]}, r"model\.embed_tokens"),
    "positions": (tiny_gpt2, {"target_modules": ["wpe", "c_attn"]}, r"transformer\.wpe"),
}


@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
@pytest.mark.parametrize(("make", "settings", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:untied")
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(
    tmp_path: Path, make: Any, settings: dict[str, Any], said: str, saved: bool
) -> None:
    plain = make()
    plain.save_pretrained(tmp_path / "base")
    model: Any = trained(plain, **settings)
    if saved:
        export_lora(model, tmp_path / "saved")
        model = tmp_path / "saved"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PissaError, match=said) as caught:
        export_lora(model, tmp_path / "lora.gguf", format="gguf", base=tmp_path / "base")
    assert "--to gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_another_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    model = trained()
    model.get_base_model().config.model_type = "mamba"  # type: ignore[union-attr]
    with pytest.raises(PissaError, match="llama, mistral"):
        export_lora(model, tmp_path / "lora.gguf", format="gguf")
    assert os.listdir(tmp_path) == []


def test_names_and_formats_that_cannot_be_right_are_refused_first(tmp_path: Path) -> None:
    for out in (None, tmp_path / "directory"):
        with pytest.raises(ConfigError, match=r"\.gguf"):
            export_lora(tmp_path / "missing", out, format="gguf")
    with pytest.raises(ConfigError, match="peft, gguf"):
        export_lora(tmp_path / "missing", tmp_path / "out", format="ggml")  # pyright: ignore[reportArgumentType]
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(OutputError, match="already"):
        export_lora(trained(), tmp_path / "there.gguf", format="gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine" and os.listdir(tmp_path) == ["there.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OutputError, match="full"):
        export_lora(trained(), tmp_path / "lora.gguf", format="gguf")
    assert os.listdir(tmp_path) == []
