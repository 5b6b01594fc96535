"""An export is what training changed, for the base as it was, and nothing is written by halves."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged, load, restore
from pissa.config import METHODS, Method
from pissa.errors import CheckpointError, ConfigError, OutputError, PissaError
from pissa.export.files import LoraExport
from pissa.export.low_rank import optimal_low_rank
from pissa.live.factors import AdapterFactors
from pissa.live.state import adapter_factors
from sampled import thinned
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_gpt2, tiny_llama, token_batch, train_steps

NOISE = 2e-6
"""fp32 rounding of logits of size 1."""
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(layers=1),
    "tied": lambda: tiny_llama(layers=1, tie=True),
    "gpt2": lambda: tiny_gpt2(layers=1),
    "half": lambda: tiny_llama(layers=1, dtype=torch.bfloat16),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"0.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 9.0}, "alpha": 2.0},
    "rslora": {"use_rslora": True, "alpha": 3.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2.0}},
    "in full": {"modules_to_save": ["lm_head", "norm"]},
}
EXPORTED = thinned(METHODS, SETTINGS, always=["plain"], whole=["pissa", "lora-kaiming"])
"""All settings with an adapter that starts at the weight and with one that starts at zero."""
pytestmark = pytest.mark.filterwarnings("ignore:untied")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        make().save_pretrained(directory / name)
    return {name: directory / name for name in BASES}


def from_disk(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def trained(base: Path, steps: int = 3, rank: int = 4, **settings: Any) -> PeftModel:
    model = adapt(from_disk(base), PissaConfig(rank, **settings))
    if steps:
        train_steps(model, steps)
    return model


Shared = Callable[..., Any]


@pytest.fixture(scope="module")
def shared(bases: dict[str, Path]) -> Shared:
    """Trained models that are made once, for tests that only read them: base, method, key of SETTINGS -> model."""
    return functools.cache(lambda kind, method, setting: trained(bases[kind], method=method, **SETTINGS[setting]))


def on_base(base: Path, lora: Path) -> Any:
    """The untouched base with an exported LoRA, by PEFT alone."""
    return PeftModel.from_pretrained(from_disk(base), str(lora))


def change(factors: AdapterFactors) -> Tensor:
    """What training changed in a module, dense, by definition; (out, in) fp64."""
    product = factors.B.double() @ factors.A.double()
    if factors.A0 is not None and factors.B0 is not None:
        product = product - factors.B0.double() @ factors.A0.double()
    return factors.scale * product


def exported_change(export: LoraExport, name: str) -> Tensor:
    """What an export with scale 1 adds to a module."""
    A, B = (export[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return B @ A


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Lossless


@pytest.mark.parametrize(("method", "setting"), EXPORTED)
def test_a_lossless_export_is_the_trained_model_on_the_untouched_base(
    bases: dict[str, Path], shared: Shared, tmp_path: Path, method: Method, setting: str
) -> None:
    before = digests(bases["llama"])
    model = shared("llama", method, setting)
    export = export_lora(model, tmp_path / "lora")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pissa.json"}
    assert set(digests(tmp_path / "lora")) == names and os.listdir(tmp_path) == ["lora"]
    assert export.config.r == (8 if not method.startswith("lora-") else 4)
    assert set(export.errors.values()) == {0.0}
    assert largest_difference(logits_of(on_base(bases["llama"], tmp_path / "lora")), logits_of(model)) < NOISE
    assert digests(bases["llama"]) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_an_adapted_head_on_a_tied_base_is_exported_right(
    bases: dict[str, Path], tmp_path: Path, kind: str, method: Method
) -> None:
    model = trained(bases[kind], method=method, target_modules=["lm_head", "c_attn" if kind == "gpt2" else "q_proj"])
    export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "small", rank=6)
    export_merged(model, tmp_path / "merged")
    expected = logits_of(model)
    assert largest_difference(expected, logits_of(from_disk(bases[kind]))) > 0.05
    assert largest_difference(logits_of(on_base(bases[kind], tmp_path / "lora")), expected) < NOISE
    assert largest_difference(logits_of(on_base(bases[kind], tmp_path / "small")), expected) < 0.5
    assert largest_difference(logits_of(from_disk(tmp_path / "merged")), expected) < NOISE


@pytest.mark.parametrize("method", METHODS)
def test_the_export_of_an_untrained_adapter_changes_nothing(
    bases: dict[str, Path], tmp_path: Path, method: Method
) -> None:
    model = trained(bases["llama"], steps=0, method=method)
    base = logits_of(from_disk(bases["llama"]))
    for name, settings in {"lossless": {}, "rank": {"rank": 3}, "tolerance": {"tolerance": 0.5}}.items():
        export: LoraExport = export_lora(model, tmp_path / name, **settings)  # pyright: ignore[reportArgumentType]
        assert set(export.errors.values()) == {0.0}
        assert largest_difference(logits_of(on_base(bases["llama"], tmp_path / name)), base) < NOISE


@pytest.mark.parametrize(("method", "setting"), EXPORTED)
def test_a_live_model_and_its_directories_export_the_same_tensors(
    bases: dict[str, Path], shared: Shared, tmp_path: Path, method: Method, setting: str
) -> None:
    settings, model = SETTINGS[setting], shared("llama", method, setting)
    model.save_pretrained(str(tmp_path / "plain"))
    first = export_lora(model, tmp_path / "export")
    wanted: list[dict[str, Any]] = [{}, {"rank": 3}, {"tolerance": 0.2}]
    for how in wanted:
        live = export_lora(model, **how)
        for source in (tmp_path / "plain", tmp_path / "export"):
            from_directory = export_lora(source, **how)
            assert from_directory.base == live.base == str(bases["llama"])
            if settings.get("use_rslora"):  # a root's last bit is lost when alpha is doubled and halved
                torch.testing.assert_close(dict(from_directory), dict(live), rtol=1e-5, atol=1e-7)
                assert from_directory.errors == pytest.approx(live.errors, abs=1e-12)
            else:
                assert same_tensors(from_directory, live) and from_directory.errors == live.errors
            assert from_directory.config.rank_pattern == live.config.rank_pattern
            assert (from_directory.config.r, from_directory.config.lora_alpha) == (
                live.config.r,
                live.config.lora_alpha,
            )
    assert same_tensors(first, load_file(tmp_path / "export" / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_an_export_leaves_the_live_model_as_it_was(bases: dict[str, Path], tmp_path: Path, method: Method) -> None:
    targets = ["q_proj", "lm_head"]
    model = trained(bases["tied"], method=method, modules_to_save=["norm"], target_modules=targets).train()
    before, config = snapshot(model), repr(model.get_base_model().config)
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    export = export_lora(model, tmp_path / "lora", rank=2)
    export_merged(model, tmp_path / "merged")
    for tensor in export.values():
        tensor.zero_()
    assert same_tensors(before, snapshot(model)) and repr(model.get_base_model().config) == config
    assert flags == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert all(module.training for module in model.modules())
    lossless = export_lora(model)
    for tensor in lossless.values():
        tensor.zero_()
    assert same_tensors(before, snapshot(model))


def test_a_fresh_process_with_peft_alone_computes_the_trained_function(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["llama"], **SETTINGS["rslora"])
    export_lora(model, tmp_path / "lora")
    torch.save({"tokens": token_batch(), "logits": logits_of(model)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(bases['llama'])!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'lora')!r})\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=expected['tokens']).logits\n"
        "assert 'pissa' not in sys.modules\n"
        "print(float((logits - expected['logits']).abs().max()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < NOISE


# Optimal lower rank


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ["pissa", "lora-kaiming"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_truncated_export_is_the_optimum_and_knows_its_error(
    shared: Shared, method: Method, setting: str, rank: int
) -> None:
    model = shared("llama", method, setting)
    export = export_lora(model, rank=rank)
    factors = adapter_factors(model)
    assert list(export.errors) == list(factors)
    for name, f in factors.items():
        dense = change(f)
        S = torch.linalg.svdvals(dense)
        optimum = float(S[rank:].square().sum().sqrt() / S.norm())
        actual = float((exported_change(export, name) - dense).norm() / dense.norm())
        assert export.errors[name] == pytest.approx(optimum, abs=1e-7)
        assert actual == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.9])
def test_a_tolerance_picks_the_smallest_rank_that_meets_it(
    bases: dict[str, Path], tmp_path: Path, tolerance: float
) -> None:
    model = trained(bases["llama"], **SETTINGS["patterns"])
    export = export_lora(model, tmp_path / "lora", tolerance=tolerance)
    for name, f in adapter_factors(model).items():
        S = torch.linalg.svdvals(change(f))
        tails = torch.cat([S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1)]).sqrt() / S.norm()
        rank = export[f"base_model.model.{name}.lora_A.weight"].shape[0]
        assert export.errors[name] == pytest.approx(float(tails[rank]), abs=1e-7) and tails[rank] <= tolerance + 1e-7
        if tolerance > 0:
            assert rank == 1 or tails[rank - 1] > tolerance
        else:
            assert rank == min(2 * f.A.shape[0], *S.shape)
    loaded = on_base(bases["llama"], tmp_path / "lora")
    for name, f in adapter_factors(loaded).items():
        torch.testing.assert_close(change(f), exported_change(export, name), rtol=0, atol=1e-9)


def test_a_rank_of_2r_or_more_is_lossless(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["llama"])
    for rank in (8, 1000):
        export = export_lora(model, tmp_path / str(rank), rank=rank)
        assert max(export.errors.values()) < 1e-7 and export.config.r == 8
        assert largest_difference(logits_of(on_base(bases["llama"], tmp_path / str(rank))), logits_of(model)) < NOISE


def test_low_rank_needs_no_more_than_the_matrix_s_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    A, A0, B, B0 = (torch.randn(shape, generator=generator) for shape in [(5, 6), (5, 6), (7, 5), (7, 5)])
    factors = AdapterFactors(A, B, 0.5, A0, B0)
    U, S, Vh = optimal_low_rank(factors)
    assert U.shape == (7, 6) and S.shape == (6,) and Vh.shape == (6, 6)
    torch.testing.assert_close((U * S) @ Vh, change(factors), rtol=0, atol=1e-12)
    torch.testing.assert_close(S, torch.linalg.svdvals(change(factors)), rtol=0, atol=1e-12)


def test_a_name_that_ends_another_one_s_keeps_its_own_rank(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["fc"](self.fc(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Nested()
    state = snapshot(base)
    model = adapt(base, PissaConfig(3, rank_pattern={"^fc": 1}))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * (number + 1))
    x = torch.eye(8)
    for name, tolerance in {"lossless": None, "truncated": 1e-6}.items():
        export_lora(model, tmp_path / name, tolerance=tolerance)
        plain: Any = Nested()
        plain.load_state_dict(state)
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / name))
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2, "tolerance": 0.1},
        {"tolerance": 1.0},
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
    ],
)
def test_a_rank_or_tolerance_that_cannot_be_right_is_refused_first(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        export_lora(tmp_path / "missing", tmp_path / "out", **settings)
    assert os.listdir(tmp_path) == []


# Merged


@pytest.mark.parametrize(("method", "setting"), EXPORTED)
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_merged_model_is_the_trained_one_for_transformers_alone(
    bases: dict[str, Path], shared: Shared, tmp_path: Path, kind: str, method: Method, setting: str
) -> None:
    settings, model = SETTINGS[setting], shared(kind, method, setting)
    export_merged(model, tmp_path / "merged")
    merged, base = from_disk(tmp_path / "merged"), from_disk(bases[kind])
    assert largest_difference(logits_of(merged), logits_of(model)) < NOISE
    assert snapshot(merged).keys() == snapshot(base).keys()
    assert merged.config.tie_word_embeddings == (kind == "tied" and "modules_to_save" not in settings)
    assert set(digests(tmp_path / "merged")) == {*digests(bases[kind]), "README.md"}


@pytest.mark.parametrize("kind", ["gpt2", "half"])
def test_a_merged_model_has_the_base_s_layout_and_dtype(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = trained(bases[kind])
    export_merged(model, tmp_path / "merged")
    base, merged = snapshot(from_disk(bases[kind])), snapshot(from_disk(tmp_path / "merged"))
    assert {n: (t.shape, t.dtype) for n, t in merged.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert largest_difference(logits_of(from_disk(tmp_path / "merged")), logits_of(model)) < (
        5e-2 if kind == "half" else NOISE
    )


def test_saved_adapters_are_merged_like_the_live_model(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["llama"])
    model.save_pretrained(str(tmp_path / "plain"))
    export_lora(model, tmp_path / "export")
    before = digests(bases["llama"])
    for source in (model, tmp_path / "plain", tmp_path / "export"):
        name = "live" if isinstance(source, PeftModel) else source.name
        export_merged(source, tmp_path / f"{name}-merged")
    weights = [load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("live", "plain", "export")]
    assert same_tensors(weights[0], weights[1]) and same_tensors(weights[0], weights[2])
    assert digests(bases["llama"]) == before
    assert largest_difference(logits_of(restore(model)), logits_of(from_disk(bases["llama"]))) < 1e-5


# Refused


def by_peft(config: Any) -> PeftModel:
    return get_peft_model(tiny_llama(), config)  # pyright: ignore


def unmerged_first() -> PeftModel:
    model: Any = adapt(tiny_llama(), PissaConfig(4))
    model.merge_adapter()
    return model


def two_adapters() -> PeftModel:
    model = by_peft(LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])  # pyright: ignore
    return model


FOREIGN: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "DoRA of an embedding": (
        lambda: by_peft(LoraConfig(target_modules=["embed_tokens"], use_dora=True)),
        "DoRA adapters of a embedding",
    ),
    "IA3": (lambda: by_peft(IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "IA3"),
    "lora_bias": (lambda: by_peft(LoraConfig(target_modules=["q_proj"], lora_bias=True)), "lora_bias"),
    "PEFT's pissa": (
        lambda: by_peft(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")),
        "initialised by PEFT as 'pissa'",
    ),
    "merged": (unmerged_first, "unmerge_adapter"),
    "two adapters": (two_adapters, r"\['default', 'second'\]"),
}


@pytest.mark.parametrize(("make", "said"), FOREIGN.values(), ids=FOREIGN)
def test_an_adapter_that_no_plain_lora_expresses_is_refused(
    tmp_path: Path, make: Callable[[], PeftModel], said: str
) -> None:
    model = make()
    for export in (export_lora, export_merged):
        with pytest.raises(PissaError, match=said) as caught:
            export(model, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True),
        AdaLoraConfig(init_r=3, target_modules=["q_proj", "down_proj"], total_step=10, lora_alpha=5),
    ],
    ids=["DoRA", "AdaLoRA"],
)
def test_what_peft_made_is_exported_as_the_same_function(tmp_path: Path, config: LoraConfig) -> None:
    model = by_peft(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    export_lora(model, tmp_path / "export")
    exported = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "export")).eval()
    assert largest_difference(logits_of(exported), logits_of(model)) < 1e-5
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert largest_difference(logits_of(merged), logits_of(model)) < 1e-5


def test_a_model_that_is_not_transformers_has_no_merged_checkpoint(tmp_path: Path) -> None:
    model = adapt(nn.Sequential(nn.Linear(4, 4)), PissaConfig(2))
    with pytest.raises(PissaError, match="Sequential is no transformers model"):
        export_merged(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_missing_adapter_or_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for export in (export_lora, export_merged):
        with pytest.raises(CheckpointError, match="is not a directory"):
            export(tmp_path / "missing", tmp_path / "out")
    model = trained(bases["llama"], steps=1)
    model.save_pretrained(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "pissa.json"):
        file = tmp_path / "adapter" / name
        file.write_text(file.read_text().replace(str(bases["llama"]), "/no/such/base"))
    export_lora(tmp_path / "adapter", tmp_path / "without-base")
    with pytest.raises(CheckpointError, match="/no/such/base does not exist"):
        export_merged(tmp_path / "adapter", tmp_path / "out")
    export_merged(tmp_path / "adapter", tmp_path / "out", base=str(bases["llama"]))
    assert largest_difference(logits_of(from_disk(tmp_path / "out")), logits_of(model)) < NOISE


# Whole or not at all

EXPORTS: list[Callable[..., Any]] = [export_lora, export_merged]


@pytest.mark.parametrize("export", EXPORTS)
def test_an_output_that_holds_something_is_refused_untouched(
    bases: dict[str, Path], tmp_path: Path, export: Callable[..., Any]
) -> None:
    model = trained(bases["llama"], steps=0, target_modules=["q_proj"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="already holds something"):
        export(model, tmp_path / "out")
    assert digests(tmp_path) == {"out/mine": hashlib.sha256(b"mine").hexdigest()}
    (tmp_path / "out" / "mine").unlink()
    export(model, tmp_path / "out")
    assert (tmp_path / "out" / "pissa.json").is_file() or (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(OutputError, match="already holds something"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("moment", ["weights", "flush"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    export: Callable[..., Any],
    moment: str,
    error: BaseException,
) -> None:
    model = trained(bases["llama"], steps=0, target_modules=["q_proj"])
    before = snapshot(model)

    def fail(*arguments: Any, **_: Any) -> None:
        for path in [Path(a) for a in arguments if isinstance(a, str | Path)]:
            (path / "half" if path.is_dir() else path).write_bytes(b"half")
        raise error

    if moment == "flush":
        monkeypatch.setattr(os, "fsync", fail)
    elif export is export_lora:
        monkeypatch.setattr("pissa.export.files.save_file", fail)
    else:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        export(model, tmp_path / "out")
    if isinstance(error, OSError):
        assert re.fullmatch(
            f"the disk that holds {re.escape(str(tmp_path))}/.* is full; make room.*", str(caught.value)
        )
    assert os.listdir(tmp_path) == []
    assert same_tensors(before, snapshot(model))


def test_the_manifest_says_what_the_export_is(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["llama"])
    export_lora(model, tmp_path / "lossless")
    small = export_lora(model, tmp_path / "small", rank=2)
    lossless, truncated = (json.loads((tmp_path / name / "pissa.json").read_text()) for name in ("lossless", "small"))
    assert lossless["layout"] == "lossless" and lossless["largest_error"] == 0
    assert truncated["layout"] is None and truncated["largest_error"] == max(small.errors.values()) > 0
    assert lossless["base"] == truncated["base"] == str(bases["llama"])
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["inference_mode"]) == (2, 2, False, True)
    assert (
        largest_difference(logits_of(load(tmp_path / "small")), logits_of(on_base(bases["llama"], tmp_path / "small")))
        == 0
    )


@pytest.mark.parametrize("live", [True, False], ids=["live", "saved"])
def test_an_adapter_that_acts_on_some_tokens_alone_is_never_merged(
    bases: dict[str, Path], tmp_path: Path, live: bool
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model: Any = get_peft_model(from_disk(bases["llama"]), config)
    model.save_pretrained(tmp_path / "alora")
    given = model if live else tmp_path / "alora"
    base = str(bases["llama"])
    with pytest.raises(PissaError, match="invocation tokens"):
        export_merged(given, tmp_path / "merged", base=None if live else base)
    with pytest.raises(PissaError, match="invocation tokens"):
        export_lora(given, tmp_path / "lora.gguf", format="gguf", base=base)
    assert os.listdir(tmp_path) == ["alora"]
    export_lora(given, tmp_path / "lora", rank=2)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 6]
