"""A plan names every tensor before any is read, and refuses by name what it cannot place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import BASES, CONFIG, CONFIGS, llama_on_disk, on_disk
from transformers import MixtralConfig, MixtralForCausalLM

from pissa import PissaConfig, init_checkpoint
from pissa.checkpoint.source.reader import open_source
from pissa.checkpoint.stream.plan import make_plan
from pissa.errors import CheckpointError, TargetError
from tiny import same_tensors, tiny_llama

pytest.importorskip("bitsandbytes")


def rewritten(base: Path, change: Any) -> None:
    """Change a base's tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def settings(base: Path, **changes: Any) -> None:
    """Change a base's configuration in place; None takes a field away."""
    document = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


@pytest.mark.parametrize("name", BASES)
def test_the_files_are_as_large_as_planned(name: str, tmp_path: Path) -> None:
    base, config = on_disk(BASES[name](), tmp_path / "base"), CONFIGS.get(name, CONFIG)
    with open_source(base) as source:
        plan = make_plan(source, config, tmp_path / "out", None)
    init_checkpoint(base, tmp_path / "out", config)
    for file in plan.files:
        assert (tmp_path / "out" / file.name).stat().st_size == file.size
        with (tmp_path / "out" / file.name).open("rb") as stream:
            assert stream.read(len(file.header)) == file.header
    costs = [job.cost for job in plan.jobs]
    assert costs == sorted(costs, reverse=True)
    outputs = [output for job in plan.jobs for output in job.outputs]
    assert sorted(outputs) == sorted(tensor for file in plan.files for tensor in file.offsets)


def test_no_weight_is_read_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama_on_disk(tmp_path / "base")
    with open_source(base) as source:
        monkeypatch.setattr(source, "_fill", lambda *_: pytest.fail("a tensor was read"))
        plan = make_plan(source, CONFIG, tmp_path / "out", None)
        assert all(parameter.is_meta for parameter in plan.model.parameters())


def test_targets_are_those_of_a_live_model(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    config = PissaConfig(
        4, target_modules=["q_proj", "mlp.up_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 8}
    )
    with open_source(base) as source:
        plan = make_plan(source, config, tmp_path / "out", None)
    splits = {job.name: job.config for job in plan.jobs if job.config is not None}
    assert {name: (c.rank, c.alpha) for name, c in splits.items()} == {
        f"model.layers.{n}.{module}": found
        for n in range(2)
        for module, found in (("self_attn.q_proj", (2, None)), ("mlp.up_proj", (4, 8)))
    }
    with open_source(base) as source, pytest.raises(TargetError, match="no module matches 'k_porj'"):
        make_plan(source, PissaConfig(4, target_modules=["k_porj"]), tmp_path / "out", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mine"}, "model_type is 'mine', which transformers"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "which transformers"),
        ({"architectures": ["MineForCausalLM"]}, "architecture 'MineForCausalLM', which transformers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, and there are 21 tensors"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ({"hidden_size": "wide"}, "describes no model"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"hidden_size": 64}, r"is \(384, 32\) and not \(384, 64\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\)"),
        ({"dtype": "float8_e4m3fn"}, "give --dtype fp32, bf16, fp16"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    settings(base, **change)
    with pytest.raises(CheckpointError, match=message) as error:
        init_checkpoint(base, tmp_path / "out", CONFIG)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    rewritten(base, lambda tensors: [tensors.pop(name) for name in ("model.norm.weight", "lm_head.weight")])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing, lm_head\.weight is missing"):
        init_checkpoint(base, tmp_path / "out", CONFIG)


def test_a_weight_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    rewritten(base, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=rf"{name} is F8_E4M3; only F32, F16, BF16 and F64"):
        init_checkpoint(base, tmp_path / "out", CONFIG)


def test_tensors_that_the_model_does_not_know_are_taken_along(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    more = {"rotary.inv_freq": torch.arange(4.0), "scales": torch.ones(3).to(torch.float8_e5m2), "n": torch.tensor(7)}
    rewritten(base, lambda tensors: tensors.update(more))
    init_checkpoint(base, tmp_path / "out", CONFIG)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same_tensors({name: found[name] for name in more}, more)


def test_a_tied_head_in_the_file_goes_by_the_embeddings_name(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base", tie=True)
    init_checkpoint(base, tmp_path / "expected", CONFIG)
    rewritten(base, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    init_checkpoint(base, tmp_path / "out", CONFIG)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert same_tensors(ours, theirs)


def test_experts_that_are_fused_on_loading_are_copied_as_they_are(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    base = on_disk(MixtralForCausalLM(config), tmp_path / "base")
    before = load_file(base / "model.safetensors")
    experts = {name for name in before if ".experts." in name}
    assert len(experts) == 12
    init_checkpoint(base, tmp_path / "out", PissaConfig(4, target_modules=["q_proj", "v_proj"]))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() >= experts and all(torch.equal(after[name], before[name]) for name in experts)
    places = (tmp_path / "out", base)
    ours, theirs = (dict(MixtralForCausalLM.from_pretrained(place).named_parameters()) for place in places)
    fused = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(ours[fused], theirs[fused])


def test_a_bin_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    init_checkpoint(base, tmp_path / "expected", CONFIG)
    (base / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), base / "pytorch_model.bin")
    init_checkpoint(base, tmp_path / "out", CONFIG)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert ours == theirs
