"""Layers in GPTQ's format train, and what they are saved as is that format, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pissa import PissaConfig, Quantization, adapt, export_merged, load, restore, save_residual
from pissa.checkpoint.source.load import load_base
from pissa.errors import CheckpointError
from pissa.live.gptq import GPTQLinear
from pissa.quantize.gptq import quantize_gptq
from tiny import largest_difference, logits_of, tiny_gpt2, tiny_llama, token_batch, train_steps

FORM = Quantization("gptq", iterations=1, momentum=0.0)


def settings(bits: int = 4, **more: Any) -> PissaConfig:
    return PissaConfig(4, quantization=Quantization("gptq", bits=bits, iterations=1, momentum=0.0, **more))  # pyright: ignore[reportArgumentType]


def unpacked(file: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """A weight from its words, by Python's whole numbers and nothing of ours; (out, in)."""
    words, zeros, scales = (file[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    group, mask = file[f"{name}.g_idx"], (1 << bits) - 1
    n, out = words.shape[0] * 32 // bits, words.shape[1]
    columns = [sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words[:, o])) for o in range(out)]
    rows = [sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(row)) for row in zeros]
    found = torch.empty(out, n)
    for o in range(out):
        for i in range(n):
            g = int(group[i])
            zero = (((rows[g] >> (bits * o)) & mask) + 1) & mask
            found[o, i] = (((columns[o] >> (bits * i)) & mask) - zero) * scales[g, o].float()
    return found


READER = """
import sys, torch, pissa
sys.path.insert(0, "tests")
from tiny import logits_of
for path in sys.argv[1:]:
    torch.save(logits_of(pissa.load(path)), path + ".pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Path]]:
    """A model of each width, saved, and read by one fresh process: bits -> model, directory."""
    folder = tmp_path_factory.mktemp("gptq")
    models: dict[int, tuple[Any, Path]] = {}
    for bits in (4, 3, 2):
        models[bits] = adapt(tiny_llama(hidden=64), settings(bits)), folder / str(bits)
        save_residual(*models[bits])
    paths = [str(path) for _, path in models.values()]
    subprocess.run([sys.executable, "-W", "ignore", "-c", READER, *paths], check=True, cwd=Path(__file__).parents[2])
    return models


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_saved_model_is_in_the_format_and_loads_bit_for_bit(bits: int, saved: dict[int, tuple[Any, Path]]) -> None:
    model, path = saved[bits]
    described = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["bits"], described["group_size"]) == ("gptq", bits, 64)
    assert described["sym"] == (bits == 4)
    file = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    layer = model.get_base_model().get_submodule(name).base_layer
    assert torch.equal(unpacked(file, name, bits), layer.weight)
    assert torch.equal(logits_of(load(path)), logits_of(model))
    assert torch.equal(torch.load(path.with_suffix(".pt")), logits_of(model))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_trains_merges_and_is_undone(make: Any, tmp_path: Path) -> None:
    base = make(hidden=64)
    before = logits_of(base)
    model: Any = adapt(make(hidden=64), settings(), batches=[{"input_ids": token_batch()}])
    assert {type(layer) for layer in model.modules() if hasattr(layer, "qweight")} == {GPTQLinear}
    assert all(certificate.output_reduction > 0 for certificate in model.pissa.certificates.values())
    start = logits_of(model)
    train_steps(model, 3)
    assert largest_difference(logits_of(model), start) > 1e-4
    trained = logits_of(model.eval())
    export_merged(model, tmp_path / "merged")
    assert largest_difference(logits_of(load_base(tmp_path / "merged")), trained) < 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    export_merged(tmp_path / "saved", tmp_path / "streamed")
    assert largest_difference(logits_of(load_base(tmp_path / "streamed")), trained) < 1e-4
    undone = restore(model, base)
    assert largest_difference(logits_of(undone), before) < 1e-5


def test_layers_that_are_left_alone_are_said() -> None:
    described = adapt(tiny_llama(hidden=64), settings()).config.quantization_config
    assert "modules_in_block_to_quantize" not in described
    some = adapt(tiny_llama(hidden=64), PissaConfig(4, target_modules=["v_proj", "up_proj"], quantization=FORM))
    inside = some.config.quantization_config["modules_in_block_to_quantize"]
    assert inside == [["mlp.up_proj", "self_attn.v_proj"]]


def test_the_gradient_is_that_of_the_dequantised_weight() -> None:
    W = torch.randn(32, 64)
    layer = GPTQLinear(quantize_gptq(W, group_size=32), torch.nn.Parameter(torch.randn(32)))
    x, same = (torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_() for _ in range(2))
    y, expected = layer(x), torch.nn.functional.linear(same, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_other_variants_of_the_format_are_refused_by_name(tmp_path: Path) -> None:
    save_residual(adapt(tiny_llama(hidden=64), settings()), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"bits": 8}, {"checkpoint_format": "gptq_v2"}):
        path.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **change}}))
        with pytest.raises(CheckpointError, match="can be read"):
            load_base(tmp_path / "out")
