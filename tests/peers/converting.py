"""From a trained PiSSA adapter to a LoRA for the base."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from observed import LINEAR, Seen, by_peft, failure, off, percent, raised
from peft import PeftModel
from safetensors import safe_open

import pissa
from pissa import PissaConfig, adapt, export_lora
from tiny import logits_of, same_tensors, tiny_llama, train_steps


def converted(scratch: Path, *, slash: bool = False, keep_initial: bool = True, **settings: Any) -> PeftModel:
    """PEFT's way: save the initial adapter by hand, train, convert while saving, load on the base."""
    return converting(scratch, slash=slash, keep_initial=keep_initial, **settings)[0]


def converting(
    scratch: Path, *, slash: bool = False, keep_initial: bool = True, **settings: Any
) -> tuple[PeftModel, torch.Tensor]:
    """The same, and the logits of the model that was converted."""
    theirs = by_peft(tiny_llama(), **settings)
    initial = scratch / "initial"
    if keep_initial:
        theirs.peft_config["default"].init_lora_weights = True  # type: ignore[attr-defined]
        theirs.save_pretrained(str(initial))
        theirs.peft_config["default"].init_lora_weights = "pissa"  # type: ignore[attr-defined]
    train_steps(theirs, 3)
    trained = logits_of(theirs.eval())
    place = f"{initial}/" if slash else str(initial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(scratch / "converted"), path_initial_model_for_weight_conversion=place)
        return PeftModel.from_pretrained(tiny_llama(), str(scratch / "converted")).eval(), trained


def exported(scratch: Path, **settings: Any) -> float:
    """Ours, by PEFT alone on the base: how far off the trained model it is."""
    model = adapt(tiny_llama(), PissaConfig(8, target_modules=LINEAR, **settings))
    train_steps(model, 3)
    trained = logits_of(model.eval())
    export_lora(model, f"{scratch}/ours/")
    error = off(logits_of(PeftModel.from_pretrained(tiny_llama(), f"{scratch}/ours/").eval()), trained)
    assert error < 1e-5
    return error


@failure("Converting needs an initial adapter that the user saved before training")
def by_hand(scratch: Path) -> Seen:
    kind = raised(lambda: converted(scratch, keep_initial=False), ValueError, OSError, FileNotFoundError)
    return Seen(f"{kind} at the end of the run", f"the initial adapter is kept by itself: {percent(exported(scratch))}")


@failure("Converting with `modules_to_save`")
def in_full(scratch: Path) -> Seen:
    kind = raised(lambda: converted(scratch, modules_to_save=["lm_head"]), KeyError)
    return Seen(kind, percent(exported(scratch, modules_to_save=["lm_head"])))


@failure("Converting with `trainable_token_indices`")
def tokens(scratch: Path) -> Seen:
    indices = [*range(100, 200)]
    kind = raised(lambda: converted(scratch, trainable_token_indices=indices), KeyError)
    return Seen(kind, percent(exported(scratch, trainable_token_indices=indices)))


@failure("Converting with DoRA")
def dora(scratch: Path) -> Seen:
    loaded, trained = converting(scratch, use_dora=True)
    error = off(logits_of(loaded), trained)
    with safe_open(scratch / "converted" / "adapter_model.safetensors", "pt") as file:
        assert not any("magnitude" in name for name in file.keys())  # noqa: SIM118 -- not a dict
    assert error > 1e-3
    return Seen(
        f"the trained magnitudes are dropped: {percent(error)} the trained model",
        f"a DoRA adapter of rank 2r with the trained magnitudes: {percent(exported(scratch, use_dora=True))}",
    )


@failure("Converting with rsLoRA and `rank_pattern`")
def rslora(scratch: Path) -> Seen:
    kind = raised(lambda: converted(scratch, use_rslora=True, rank_pattern={"q_proj": 4}), ValueError)
    return Seen(kind, percent(exported(scratch, use_rslora=True, rank_pattern={"q_proj": 4})))


@failure("A trailing slash in the initial adapter's path")
def trailing_slash(scratch: Path) -> Seen:
    kind = raised(lambda: converted(scratch, slash=True), ValueError, KeyError, OSError)
    return Seen(kind, "any path")


@failure("The converted rank")
def doubled(scratch: Path) -> Seen:
    theirs = converted(scratch)
    rank = theirs.peft_config["default"].r  # type: ignore[attr-defined]
    model = adapt(tiny_llama(), PissaConfig(8, target_modules=LINEAR))
    train_steps(model, 3)
    lossless, small = export_lora(model), export_lora(model, rank=8)
    loss = max(small.errors.values())
    assert rank == lossless.config.r == 16 and small.config.r == 8 and 0 < loss < 1
    return Seen(
        f"{rank} for an adapter of rank 8, always",
        f"{rank} without loss, or any rank, or the smallest within a tolerance, each with the error that it costs",
    )


@failure("A residual saved dequantised is quantised anew when it is loaded", peer="the authors' scripts")
def quantised_twice(scratch: Path) -> Seen:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # init_qpissa.py: NF4 without double quantisation, saved in 16 bits; loaded as users do, with it
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(256, 256, generator=generator)
    once = dequantize_4bit(*quantize_4bit(residual, quant_type="nf4", compress_statistics=False))
    stored = once.bfloat16()
    twice = dequantize_4bit(*quantize_4bit(stored, quant_type="nf4", compress_statistics=True)).float()
    moved = off(twice, once)
    model: Any = adapt(tiny_llama(hidden=64), PissaConfig(8, quantization=pissa.Quantization()))
    before_state = pissa_state(model)
    pissa.save_residual(model, scratch / "residual")
    again = pissa.load(scratch / "residual")
    assert moved > 1e-3 and same_tensors(before_state, pissa_state(again))
    shutil.rmtree(scratch / "residual")
    return Seen(
        f"the weights move by {100 * moved:.1f} % of their norm",
        "codes and scales are stored: the same bits",
    )


def pissa_state(model: Any) -> dict[str, torch.Tensor]:
    """What the 4-bit layers dequantise to."""
    from pissa.live.layers import place_of
    from pissa.live.quantized import quantized_layers

    return {
        name.replace(".base_layer", ""): place_of(layer).matrices()
        for name, layer in quantized_layers(model.get_base_model()).items()
    }
