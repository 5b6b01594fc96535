"""An inspection's figures are those of the splits themselves, and the model is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from pissa import PissaConfig, quantization_preset, reduction_ratio, split_weight
from pissa.calibrate.moments import second_moments
from pissa.config import Quantization
from pissa.errors import ConfigError, DataError
from pissa.lab.inspection.inspect import inspect
from pissa.lab.inspection.layers import block_of, kind_of
from pissa.lab.inspection.measure import inspect_quantized, inspect_split
from pissa.lab.inspection.settings import InspectionSettings
from pissa.lab.inspection.tables import inspection_table
from pissa.lab.inspection.text import read_calibration
from pissa.lab.inspection.variants import variant, variants
from pissa.live.layers import place_of
from pissa.training.recipe import Recipe
from tiny import CORPUS, same_tensors, snapshot, tiny_gpt2, tiny_llama, tiny_tokenizer

KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TEXT = "\n".join(f"{number} {line}" for number in range(20) for line in CORPUS)


def row(document: dict[str, Any], method: str, norm: str, rank: int = 4) -> dict[str, Any]:
    [found] = [r for r in document["rows"] if (r["method"], r["norm"], r["rank"]) == (method, norm, rank)]
    return found


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """A tiny model with its tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_reductions_are_those_of_the_splits() -> None:
    model = tiny_llama()
    before = snapshot(model)
    chosen = variants(["qlora", "qpissa-2", "ours-2"], calibrated=False, block_size=32)
    document = inspect_quantized(model, chosen, [4])
    assert document["layers"] == 14
    config = PissaConfig(rank=4, quantization=quantization_preset("qpissa-2", block_size=32))
    for norm in ("nuclear", "frobenius"):
        found = row(document, "qpissa-2", norm)
        assert found["by_kind"].keys() == KINDS
        names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
        weights = [place_of(model.get_submodule(name)).matrices() for name in names]
        expected = [
            reduction_ratio(W, split_weight(W, config, name=n), norm=norm) for n, W in zip(names, weights, strict=True)
        ]
        assert found["by_kind"]["up_proj"] == pytest.approx(sum(expected) / 2, abs=1e-3)
        assert found["mean"] == pytest.approx(sum(found["by_kind"].values()) / len(KINDS))
        assert row(document, "qlora", norm)["mean"] == 0
        assert row(document, "ours-2", norm)["mean"] > found["mean"]
    assert same_tensors(before, snapshot(model))


def test_output_error_is_measured_on_text_that_no_fit_has_seen(text: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    calibration = read_calibration(text, tokenizer, length=16, windows=20)
    assert (calibration.description["windows"], calibration.description["held_out_windows"]) == (16, 4)
    fitted = {tuple(window.tolist()) for batch in calibration.fit for window in batch["input_ids"]}
    assert fitted.isdisjoint(tuple(w.tolist()) for batch in calibration.held_out for w in batch["input_ids"])
    chosen = variants(["qlora", "ours-2", "ours-2+aware"], calibrated=True, block_size=32)
    document = inspect_quantized(model, chosen, [4], norms=["frobenius"], calibration=calibration)

    name = "model.layers.1.mlp.down_proj"
    [fit] = second_moments(model, calibration.fit, [name])
    [held_out] = second_moments(model, calibration.held_out, [name])
    split = split_weight(
        place_of(model.get_submodule(name)).matrices(), chosen[2].config(4, 0), moment=fit.matrix, name=name
    )
    E = place_of(model.get_submodule(name)).matrices() - split.restore()
    factor = torch.linalg.cholesky(held_out.matrix.double() + 1e-9 * torch.eye(64))
    only = inspect_quantized(
        model, chosen[2:], [4], norms=["frobenius"], calibration=calibration, target_modules=[name]
    )
    assert row(only, "ours-2+aware", "output")["error"] == pytest.approx(float((E.double() @ factor).norm()), rel=1e-4)
    assert row(document, "ours-2", "output")["mean"] > 0


def test_each_rank_has_its_rows_and_higher_ranks_reduce_more() -> None:
    document = inspect_quantized(tiny_llama(), [variant("loftq-1", block_size=32)], [2, 8], norms=["nuclear"])
    assert [(r["rank"], r["norm"]) for r in document["rows"]] == [(2, "nuclear"), (8, "nuclear")]
    assert row(document, "loftq-1", "nuclear", 8)["mean"] > row(document, "loftq-1", "nuclear", 2)["mean"]


def test_some_blocks_only() -> None:
    document = inspect_quantized(
        tiny_llama(), [variant("qlora", block_size=32)], [2], norms=["frobenius"], max_layers=1
    )
    assert document["layers"] == 7
    with pytest.raises(ConfigError, match="max_layers is 0"):
        inspect_quantized(tiny_llama(), [variant("qlora", block_size=32)], [2], max_layers=0)


def test_plain_split_shows_captured_energy() -> None:
    model = tiny_gpt2()
    document = inspect_split(model, 4)
    layer = document["layers"][0]
    W = place_of(model.get_submodule(layer["name"])).matrices()
    energies = torch.linalg.svdvals(W.double()).square()
    assert layer["captured"] == pytest.approx(100 * float(energies[:4].sum() / energies.sum()), rel=1e-4)
    assert layer["shape"] == list(W.shape)
    assert document["rows"][0]["by_kind"].keys() == {"attn.c_proj", "mlp.c_proj", "c_attn", "c_fc"}


def test_names_of_blocks_and_kinds() -> None:
    assert kind_of("model.layers.11.self_attn.q_proj") == "q_proj"
    assert kind_of("encoder.layer.0.attention.output.dense") == "attention.output.dense"
    assert kind_of("encoder.layer.0.output.dense") == "output.dense"
    assert kind_of("pooler.dense") == "pooler.dense"
    assert block_of("layers.3.mlp.experts.7.w1") == "layers.3"
    assert block_of("pooler.dense") is None


def test_names_of_methods() -> None:
    assert variant("ours-5").quantization == quantization_preset("ours-5")
    assert not variant("ours-5").aware
    assert variant("ours-4+gptq").quantization.rounding == "gptq"
    assert variant("qpissa-5+aware", format="int8").quantization == Quantization(
        "int8", iterations=5, refit=False, scale_search="absmax", momentum=0
    )
    for wrong in ("ours", "ours-5+magic", "qpissa-0", ""):
        with pytest.raises(ConfigError, match="is called"):
            variant(wrong)
    with pytest.raises(ConfigError, match=r"ours-5\+aware needs calibration"):
        variants(["qlora", "ours-5+aware"], calibrated=False)


def test_an_encoder_without_a_head_can_be_inspected(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertModel(BertConfig(vocab_size=384, **size)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    asked = InspectionSettings(
        rank=(2,),
        quantize="nf4",
        methods=("ours-1+gptq",),
        block_size=32,
        calibration=str(text),
        length=16,
        windows=10,
        norm="nuclear",
    )
    document = inspect(str(tmp_path / "bert"), asked)
    assert {r["norm"] for r in document["rows"]} == {"nuclear", "output"}
    assert "attention.output.dense" in document["rows"][0]["by_kind"]
    assert json.loads(json.dumps(document)) == document


def test_figures_and_table(directory: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked = InspectionSettings((4,), quantize="nf4", methods=("qlora", "ours-1"), block_size=32, norm="nuclear")
    document = inspect(directory, replace(asked, figures=str(tmp_path / "figures")))
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == ["reduction.png", "singular_values.png"]
    assert all((tmp_path / "figures" / name).stat().st_size > 10_000 for name in files)
    table = inspection_table(document).splitlines()
    assert table[2].startswith("nuclear-norm error of nf4 reduced by (%), rank 4")
    assert [line.split()[0] for line in table[3:]] == ["method", "qlora", "ours-1"]


def test_what_cannot_be_inspected_is_refused(directory: str, text: Path) -> None:
    with pytest.raises(ConfigError, match="plain split at one rank"):
        InspectionSettings((4,), calibration=str(text))
    for ranks in ((0,), (), (4, True), "4,x", 4):
        with pytest.raises(ConfigError, match=r"rank is .*; give a whole number of at least 1, or several"):
            InspectionSettings(ranks)  # pyright: ignore[reportArgumentType]
    nf4 = InspectionSettings((4,), quantize="nf4", methods=("qlora",), block_size=32)
    with pytest.raises(ConfigError, match="give --calibration"):
        replace(nf4, held_out=str(text))
    with pytest.raises(DataError, match="give more text"):
        inspect(directory, replace(nf4, calibration=str(text), length=512, windows=400))
    with pytest.raises(ConfigError, match="rank exceeds"):
        inspect(directory, replace(nf4, rank=(33,)))


def test_modules_mean_what_they_mean_in_training(directory: str) -> None:
    """A name with a dot is a name ending, not a regular expression that matches nothing."""
    counts = {}
    for given in ("self_attn.q_proj", "q_proj", r".*\.self_attn\.q_proj", "self_attn.q_proj, v_proj"):
        asked = InspectionSettings((2,), target_modules=given)
        assert asked.target_modules == Recipe(target_modules=given).target_modules
        counts[given] = len(inspect(directory, asked)["layers"])
    assert list(counts.values()) == [2, 2, 2, 4]


@pytest.mark.slow
def test_published_and_better_reductions_on_a_real_encoder(pissa_data: Path) -> None:
    import os

    model = os.environ.get("PISSA_MINILM")
    if model is None:
        pytest.skip("needs all-MiniLM-L6-v2: set PISSA_MINILM to its directory")
    targets = r"encoder\..*\.(query|key|value|dense)"
    asked = InspectionSettings((12,), quantize="nf4", double_quant=False, norm="nuclear", target_modules=targets)
    means = {row["method"]: row["mean"] for row in inspect(model, asked)["rows"]}
    for method, expected in {"loftq-1": 6.9, "qpissa-1": 9.9, "loftq-5": 14.4, "qpissa-5": 18.3}.items():
        assert means[method] == pytest.approx(expected, abs=1)
    assert means["ours-5"] >= 26
    assert means["ours-10"] >= 30
