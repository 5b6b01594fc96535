"""A saved adapter is merged from files to files with the bits of merging the loaded model, whatever its base is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pissa import PissaConfig, Quantization, adapt, export_lora, export_merged, load, save_residual
from pissa.checkpoint.source.load import load_base
from pissa.checkpoint.source.reader import open_source
from pissa.errors import CheckpointError, OutputError
from pissa.live.quantized import bits_of
from sampled import thinned
from tiny import logits_of, same_tensors, tiny_gpt2, tiny_llama, tiny_tokenizer, train_steps

pytestmark = pytest.mark.filterwarnings("ignore:untied", "ignore:fan_in_fan_out")
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(layers=1),
    "tied": lambda: tiny_llama(layers=1, tie=True),
    "gpt2": lambda: tiny_gpt2(layers=1, hidden=64),
    "bf16": lambda: tiny_llama(layers=1, hidden=64, dtype=torch.bfloat16),
    "fp16": lambda: tiny_gpt2(layers=1, hidden=64, dtype=torch.float16),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "lora": {"method": "lora-kaiming"},
    "rslora": {"use_rslora": True, "alpha": 3.0, "rank_pattern": {"0.mlp.[a-z_]*": 2}},
    "in full": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "offset": {"placement": "offset"},
    "offset rslora": {"placement": "offset", "use_rslora": True, "alpha": 3.0},
}
FORMATS = {
    "nf4": Quantization(iterations=1, momentum=0.0),
    "nf4-single": Quantization(iterations=1, momentum=0.0, double_quant=False),
    "int8": Quantization("int8", iterations=1, momentum=0.0),
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def compare(path: Path, out: Path, base: str | None = None) -> Any:
    """Merge a saved adapter both ways; they must agree in every bit and setting. Returns the merged model."""
    live = load(path, base)
    export_merged(live, out / "live")
    export_merged(path, out / "streamed", base=base)
    assert same_tensors(tensors_of(out / "streamed"), tensors_of(out / "live"))
    configs = [json.loads((out / name / "config.json").read_text()) for name in ("live", "streamed")]
    assert configs[0] == configs[1]
    merged = load_base(out / "streamed")
    assert torch.equal(logits_of(merged), logits_of(load_base(out / "live")))
    rounds_inputs = any(bits_of(layer) == 8 for layer in live.modules())
    bound = 2e-6 if merged.dtype == torch.float32 and not rounds_inputs else 0.05
    assert torch.allclose(logits_of(merged), logits_of(live), rtol=0, atol=bound)
    return merged


@pytest.mark.parametrize(("kind", "settings"), thinned(BASES, SETTINGS, always=["pissa", "offset"]))
def test_streaming_gives_the_bits_of_the_loaded_model(tmp_path: Path, kind: str, settings: str) -> None:
    BASES[kind]().save_pretrained(tmp_path / "base")
    model = adapt(load_base(tmp_path / "base"), PissaConfig(4, **SETTINGS[settings]))
    if next(model.parameters()).dtype == torch.float16:
        nudge(model)
    else:
        train_steps(model)
    model.save_pretrained(str(tmp_path / "plain"))
    export_lora(model, tmp_path / "lossless")
    compare(tmp_path / "plain", tmp_path / "of-plain")
    compare(tmp_path / "lossless", tmp_path / "of-lossless")


def nudge(model: Any) -> None:
    """Training without a step in fp16, which a CPU is slow at."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.data += 0.01 * noise.to(parameter.dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bf16"])
def test_a_quantised_residual_is_merged_dequantised(tmp_path: Path, kind: str, form: str) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny_llama(layers=1, hidden=64) if kind == "llama" else BASES[kind]()
    model = adapt(base, PissaConfig(4, quantization=FORMATS[form]))
    save_residual(model, tmp_path / "residual")
    train_steps(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = compare(tmp_path / "adapter", tmp_path)
    assert not hasattr(merged.config, "quantization_config")
    # the base itself in few bits, with an adapter beside it
    beside = adapt(load_base(tmp_path / "residual"), PissaConfig(4, placement="offset"))
    train_steps(beside)
    export_lora(beside, tmp_path / "beside")
    compare(tmp_path / "beside", tmp_path / "of-beside")


def test_an_unquantised_residual_is_merged_as_it_is(tmp_path: Path) -> None:
    model = adapt(tiny_llama(dtype=torch.bfloat16), PissaConfig(4))
    save_residual(model, tmp_path / "residual")
    train_steps(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    compare(tmp_path / "adapter", tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in `base/` with its tokenizer, and a trained adapter for it in `adapter/`."""
    folder = tmp_path_factory.mktemp("run")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text("free")
    model = adapt(load_base(folder / "base"), PissaConfig(4))
    train_steps(model)
    export_lora(model, folder / "adapter")
    return folder


def test_shards_and_pickles_are_merged_like_one_file(run: Path, tmp_path: Path) -> None:
    export_merged(run / "adapter", tmp_path / "expected")
    expected = tensors_of(tmp_path / "expected")
    load_base(run / "base").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copytree(run / "base", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors_of(run / "base"), tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("sharded", "pickled"):
        export_merged(run / "adapter", tmp_path / f"{name}-merged", base=str(tmp_path / name))
        assert same_tensors(tensors_of(tmp_path / f"{name}-merged"), expected)


def test_a_merged_model_comes_with_its_base_s_tokenizer_and_licence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_merged(run / "adapter", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (run / "base").iterdir()} | {"README.md"}
    for name in names - {"model.safetensors", "config.json", "README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (run / "base" / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def tiny_mixtral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))


KINDS_OF_RUN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear layers": (tiny_llama, {}),
    "modules in full": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "trainable tokens": (tiny_llama, {"trainable_token_indices": (3, 7)}),
    "experts": (tiny_mixtral, {"target_modules": ["experts.gate_up_proj", "experts.down_proj", "q_proj"]}),
    "dora": (tiny_llama, {"use_dora": True}),
    "tied head": (lambda: tiny_llama(tie=True), {"target_modules": ["lm_head"]}),
}


@pytest.mark.parametrize("own", [False, True], ids=["base's tokenizer", "run's tokenizer"])
@pytest.mark.parametrize(("make", "settings"), KINDS_OF_RUN.values(), ids=KINDS_OF_RUN)
def test_a_merged_model_comes_with_its_companions_whatever_was_adapted(
    tmp_path: Path, make: Callable[[], Any], settings: dict[str, Any], own: bool
) -> None:
    make().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("mine")
    adapt(load_base(tmp_path / "base"), PissaConfig(4, **settings)).save_pretrained(str(tmp_path / "run"))
    if own:
        tiny_tokenizer(chat_template="{{ messages[0]['content'] }} of the run").save_pretrained(tmp_path / "run")
    export_merged(tmp_path / "run", tmp_path / "merged", base=str(tmp_path / "base"))
    kept = {file.name for file in (tmp_path / "base").iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"} <= kept
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == kept | {"README.md", "config.json", "model.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / ("run" if own else "base"))
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_vocab() == tokenizer.get_vocab() and merged.chat_template == tokenizer.chat_template


def test_weights_stored_more_finely_than_config_json_says_are_rounded_as_when_loaded(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "base", tmp_path / "base")
    wide = {name: tensor.float() * (1 + 2**-12) for name, tensor in tensors_of(run / "base").items()}
    save_file(wide, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    compare(run / "adapter", tmp_path, base=str(tmp_path / "base"))


def test_an_export_from_a_run_needs_no_base(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run / "base"), str(tmp_path / "gone")))
    manifest = tmp_path / "adapter" / "pissa.json"
    manifest.write_text(manifest.read_text().replace(str(run / "base"), str(tmp_path / "gone")))
    for rank in (None, 3):
        here, there = (export_lora(folder / "adapter", rank=rank) for folder in (run, tmp_path))
        assert same_tensors(dict(here), dict(there))
    with pytest.raises(CheckpointError, match="gone does not exist"):
        export_merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Refused


def test_what_does_not_fit_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "wider")
    shutil.copytree(run / "base", tmp_path / "gptq")
    shutil.copytree(run / "base", tmp_path / "cut")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "cut" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    before = sorted(tmp_path.rglob("*"))
    for name, said in {
        "gpt2": "was made for another base",
        "wider": "was made for another base",
        "gptq": r"is quantised \(gptq\): nothing can be merged into it",
        "cut": "is not whole",
    }.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            export_merged(run / "adapter", tmp_path / "out", base=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="already holds something"):
        export_merged(run / "adapter", tmp_path / "gpt2")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"]
)
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    count = 0

    def fail(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal count
        count += 1
        if count > 9:
            raise error
        return write(descriptor, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        export_merged(run / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and count == 10
    if isinstance(error, OSError):
        assert str(caught.value).endswith("out is full; make room and run the same command again")


def set_state(tensors: dict[str, torch.Tensor], **values: Any) -> None:
    name = next(name for name in tensors if name.endswith("quant_state.bitsandbytes__nf4"))
    state = {**json.loads(bytes(tensors[name].numpy())), **values}
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no scales": lambda t: t.pop(next(name for name in t if name.endswith(".absmax"))),
    "too few scales": lambda t: t.update({n: s[:-1].clone() for n, s in t.items() if n.endswith(".nested_absmax")}),
    "not JSON": lambda t: t.update({n: s[:-30].clone() for n, s in t.items() if "quant_state" in n}),
    "huge shape": lambda t: set_state(t, shape=[1 << 40, 64]),
    "negative shape": lambda t: set_state(t, shape=[-64, -64]),
    "no block": lambda t: set_state(t, blocksize=0),
    "other block": lambda t: set_state(t, blocksize=128),
    "other kind": lambda t: set_state(t, quant_type="fp4"),
    "other dtype": lambda t: set_state(t, dtype="int8"),
    "a word for a number": lambda t: set_state(t, nested_offset="x"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_quantised_weight_is_refused(tmp_path: Path, damage: Callable[..., object]) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapt(tiny_llama(hidden=64), PissaConfig(4, quantization=FORMATS["nf4"], target_modules=["q_proj"]))
    save_residual(model, tmp_path / "residual")
    model.save_pretrained(str(tmp_path / "adapter"))
    tensors = tensors_of(tmp_path / "residual")
    damage(tensors)
    save_file(tensors, tmp_path / "residual" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is no whole weight of bitsandbytes in NF4"):
        export_merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Memory

MERGE = """
import sys
from pathlib import Path
from pissa import export_merged

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

export_merged(sys.argv[1], sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
export_merged(sys.argv[2], sys.argv[4])
print(status("VmHWM") - before)
"""


def large_run(folder: Path, layers: int) -> Path:
    """A base of 16.8 million weights a layer, and a lossless LoRA for it; no model is ever made."""
    hidden, rank = 1024, 8
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4 * hidden * hidden, generator=generator).bfloat16()
    (folder / "base").mkdir(parents=True)
    config.save_pretrained(folder / "base")
    tensors = {name: values[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    targets = [name.removesuffix(".weight") for name in shapes if "_proj" in name]
    adapter = {}
    for name in targets:
        out, columns = shapes[f"{name}.weight"]
        adapter[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2 * rank, columns, generator=generator)
        adapter[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2 * rank, generator=generator)
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted({name.rpartition(".")[2] for name in targets})
    lora = LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=modules)
    lora.base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(str(folder / "adapter"))
    (folder / "adapter" / "pissa.json").write_text(json.dumps({"layout": "lossless", "base": str(folder / "base")}))
    return folder / "adapter"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_merging_never_holds_the_model(tmp_path: Path) -> None:
    small, large = large_run(tmp_path / "small", 1), large_run(tmp_path / "large", 8)
    outs = [str(tmp_path / "small" / "out"), str(tmp_path / "large" / "out")]
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MERGE, str(small), str(large), *outs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    print(outcome.stdout)
    size = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    adapter = (large / "adapter_model.safetensors").stat().st_size
    # the largest weight is 8 MB, the adapter is in memory twice: as read, and as its halves
    assert size > 256 << 20 and int(outcome.stdout) << 10 < 2 * adapter + (64 << 20)
    with open_source(outs[1]) as merged, open_source(tmp_path / "large" / "base") as base:
        assert merged.entries.keys() == base.entries.keys()
        name = "model.layers.7.mlp.down_proj.weight"
        assert not torch.equal(merged.read(name), base.read(name))
        assert torch.equal(merged.read("lm_head.weight"), base.read("lm_head.weight"))
