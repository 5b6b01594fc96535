"""No code that comes with a model is run, nobody is asked whether to run it, and one module alone loads anything."""

from __future__ import annotations

import ast
import builtins
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa.checkpoint.source.load import load_base, load_config, load_tokenizer, without_values
from pissa.checkpoint.source.no_foreign_code import through_transformers
from pissa.checkpoint.source.reader import check_kernels, open_source
from pissa.checkpoint.source.skeleton import build
from pissa.errors import CheckpointError, PissaError
from pissa.evaluation.load import load_subject
from pissa.lab.load import load_any_tokenizer, load_model
from pissa.outside.limits import bounded
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LOADER = "src/pissa/checkpoint/source/no_foreign_code.py"
PEFT_CONFIGURATIONS = "src/pissa/checkpoint/adapter_config.py"
"""Reads adapter_config.json through PEFT's own classes, which know no code of strangers."""
OF_ONES_OWN = {("studies/small_lm.py", "from_config"), ("src/pissa/live/quantized.py", "from_config")}
"""A configuration that the study makes itself; transformers' quantiser, which is no model."""


def test_nothing_calls_from_pretrained_or_from_config_but_the_loader() -> None:
    found = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "studies").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if called in ("from_pretrained", "from_config"):
                found.add((path.relative_to(ROOT).as_posix(), called))
    assert found == {
        (LOADER, "from_pretrained"),
        (LOADER, "from_config"),
        (PEFT_CONFIGURATIONS, "from_pretrained"),
        *OF_ONES_OWN,
    }


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole tiny model with code beside it that leaves a mark when it is run, and a terminal where "y" is typed."""
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    code = f"""
open({str(tmp_path / "mark")!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
    (directory / "code.py").write_text(code)
    (directory / "foreign.py").write_text(code)

    def asked(prompt: str = "") -> str:
        (tmp_path / "asked").write_text(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    return directory


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


MAP: dict[str, Any] = dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"), "foreign.Model"
)
MAP |= {"AutoConfig": "foreign.Config", "AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_base": load_base,
    "load_tokenizer": load_tokenizer,
    "load_config": load_config,
    "without_values": lambda path: without_values(path, dtype=torch.float32),
    "load_model": load_model,
    "load_any_tokenizer": load_any_tokenizer,
    "load_subject": load_subject,
    "a classifier": lambda path: through_transformers("AutoModelForSequenceClassification", path, "a classifier"),
}


@pytest.mark.parametrize("model_type", ["foreign", "vit", "llama"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_strangers_code_is_neither_run_nor_asked_about(hostile: Path, loader: str, model_type: str) -> None:
    edit(hostile / "config.json", model_type=model_type, auto_map=MAP, architectures=["Model"])
    edit(hostile / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LOADERS[loader](hostile)
    except PissaError as error:
        message = str(error)
        assert "\n" not in message
        assert "trust_remote_code" not in message and "[y/N]" not in message
    assert not (hostile.parent / "mark").exists()
    assert not (hostile.parent / "asked").exists()


def test_what_needs_a_strangers_code_is_refused_with_the_reason(hostile: Path) -> None:
    edit(hostile / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Tokenizer")
    with pytest.raises(CheckpointError, match=r"needs code that comes with it, which pissa never runs"):
        load_tokenizer(hostile)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "some-org/some-kernel"},
        {"attn_implementation": {"": "sdpa", "vision_config": "some-org/some-kernel:func"}},
        {"text_config": {"_attn_implementation": "kernels-community/flash-attn2"}},
        {"parts": [{"_experts_implementation": "some-org/kernel@main"}]},
    ],
)
def test_a_kernel_of_the_hub_is_refused_wherever_it_is_named(hostile: Path, fields: dict[str, Any]) -> None:
    edit(hostile / "config.json", **fields)
    for load in (load_base, load_config, open_source):
        with pytest.raises(CheckpointError, match="a kernel from the hub, which pissa does not fetch"):
            load(hostile)
    check_kernels({"_attn_implementation": "sdpa", "text_config": {"_attn_implementation": None}}, "config.json")


@pytest.mark.parametrize("name", ["PreTrainedModel", "LlamaPreTrainedModel", "BertPreTrainedModel"])
def test_an_architecture_that_is_a_base_class_is_refused(hostile: Path, name: str) -> None:
    edit(hostile / "config.json", architectures=[name])
    with open_source(hostile) as source, pytest.raises(CheckpointError, match="is none itself"):
        build(source)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 10**9},
        {"vocab_size": 10**15},
        {"intermediate_size": 10**10},
        {"hidden_size": 4 * 10**7},
        {"num_hidden_layers": 10**8},
        {"head_dim": 4 * 10**8},
    ],
)
def test_sizes_beyond_those_of_the_tensors_cost_no_memory(hostile: Path, fields: dict[str, int]) -> None:
    edit(hostile / "config.json", **fields)
    for load in (load_base, load_model):
        with pytest.raises(CheckpointError) as caught, bounded(120, 4 << 30):
            load(hostile)
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_a_buffer_beyond_all_sizes_costs_no_memory(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", n_positions=10**9)
    with pytest.raises(CheckpointError), bounded(120, 4 << 30):
        load_base(tmp_path)
