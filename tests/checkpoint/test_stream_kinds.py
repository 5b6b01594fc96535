"""Checkpoints with every kind of layer, split and merged from files to files: the bits of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pissa
from families import FAMILIES, logits
from pissa import PissaConfig, adapt, export_merged, init_checkpoint, save_residual, verify
from tiny import same_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
STREAMED = [
    "mixtral",
    "mixtral-router",
    "mixtral-one-expert",
    "inkling",
    "qwen-moe",
    "deepseek-moe",
    "gpt-oss",
    "gemma3-embedding",
    "gpt-2-embeddings",
    "bert-embeddings",
    "vit",
    "resnet",
    "convnext",
]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's model."""
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_residual_is_that_of_the_model_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base: Any = tmp_path / "base"
    family.make().to(dtype).save_pretrained(base)
    config = PissaConfig(2, target_modules=family.targets)
    result = init_checkpoint(base, tmp_path / "streamed", config)
    model = adapt(family.model.from_pretrained(base), config)
    save_residual(model, tmp_path / "live")
    streamed, live = tensors(tmp_path / "streamed"), tensors(tmp_path / "live")
    common = streamed.keys() & live.keys()
    adapted = {described["weight"] for described in result.manifest["modules"].values()}
    assert adapted <= common and len(adapted) == family.adapted
    assert same_tensors({key: streamed[key] for key in adapted}, {key: live[key] for key in adapted})
    # some parameters of some families are in fp32 whenever they are in memory
    assert all(torch.equal(streamed[key].to(live[key].dtype), live[key]) for key in common - adapted)
    initial = [load_file(tmp_path / of / "pissa_init" / "adapter_model.safetensors") for of in ("streamed", "live")]
    assert same_tensors(*initial)
    for key in ("rounding", "captured_energy_loss"):
        ours = {n: described[key] for n, described in result.manifest["modules"].items()}
        assert ours == {n: getattr(c, key) for n, c in model.pissa.certificates.items()}  # pyright: ignore

    again = family.model.from_pretrained(tmp_path / "streamed").eval()
    again = pissa.load(tmp_path / "streamed", again).eval()
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in family.batch().items()}
    assert torch.equal(logits(again, batch), logits(model.eval(), batch))
    verified = verify(tmp_path / "streamed", base)
    assert set(verified.errors) == set(result.manifest["modules"])


@pytest.mark.parametrize("placement", ["residual", "offset"])
@pytest.mark.parametrize("name", STREAMED)
def test_a_saved_adapter_is_merged_into_what_the_live_one_is(name: str, placement: Any, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "base")
    model: Any = adapt(
        family.model.from_pretrained(tmp_path / "base"),
        PissaConfig(2, target_modules=family.targets, placement=placement),
    )
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(1.25)
    model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    expected = logits(model.eval(), family.batch())
    export_merged(tmp_path / "saved", tmp_path / "merged", base=str(tmp_path / "base"))
    merged = family.model.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, family.batch()), expected, rtol=1e-4, atol=1e-5)
