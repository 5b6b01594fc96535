"""Models on a device: adapted, trained, referred to, saved, loaded, exported, restored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from registry import Unavailable, holds
from torch import Tensor
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, Quantization, adapt, export_lora, export_merged, load, reference, restore
from pissa.config import METHODS
from tiny import tiny_llama, token_batch

CLOSE = 1e-4
"""Relative distance that fp32 rounding may make in a model of two layers."""


def model_on(device: torch.device, **options: Any) -> Any:
    """A Llama of one layer on the device. Its attention is plain matrix products, which every device has."""
    model: Any = tiny_llama(layers=1, **options)
    model.set_attn_implementation("eager")
    return model.to(device)


def logits(model: Any, device: torch.device) -> Tensor:
    """On the CPU, in fp64."""
    with torch.no_grad():
        return model(input_ids=token_batch().to(device)).logits.cpu().double()


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float(torch.dist(found, wanted) / wanted.norm())


def train(model: Any, device: torch.device) -> None:
    """Two steps of AdamW."""
    batch = token_batch(7).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def needs_storage(device: torch.device) -> None:
    """What follows reads a tensor's memory, or makes a parameter of its own class of it.

    Raises:
        Unavailable: on a stand-in, whose tensors are a class of their own without memory.
    """
    if type(torch.empty(0, device=device)) is not Tensor:
        raise Unavailable("needs a real device")


@contextmanager
def folder() -> Iterator[Path]:
    """A directory that goes away."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


@holds
def every_method_preserves_the_function_and_trains(device: torch.device) -> None:
    wanted = logits(model_on(device), device)
    for method in METHODS:
        model = adapt(model_on(device), PissaConfig(rank=4, method=method))
        assert {p.device.type for p in model.parameters()} == {device.type}, method
        assert apart(logits(model, device), wanted) <= CLOSE, method
        train(model, device)
        assert apart(logits(model, device), wanted) > 10 * CLOSE, method
        with reference(model):
            assert apart(logits(model, device), wanted) <= CLOSE, method


@holds
def what_was_saved_on_a_cpu_is_loaded_to_the_device(device: torch.device) -> None:
    cpu = torch.device("cpu")
    for placement in ("residual", "offset"):
        model = adapt(model_on(cpu), PissaConfig(rank=4, placement=placement))
        train(model, cpu)
        trained = logits(model, cpu)
        with folder() as place:
            model.save_pretrained(str(place))
            again = load(place, model_on(device), is_trainable=True)
        assert {p.device.type for p in again.parameters()} == {device.type}
        assert apart(logits(again, device), trained) <= CLOSE
        train(again, device)


@holds
def what_was_saved_on_the_device_is_loaded_and_exported(device: torch.device) -> None:
    needs_storage(device)
    for placement in ("residual", "offset"):
        model = adapt(model_on(device), PissaConfig(rank=4, placement=placement))
        train(model, device)
        trained = logits(model, device)
        with folder() as place:
            model.save_pretrained(str(place / "saved"))
            export_lora(model, place / "lora")
            export_merged(model, place / "merged")
            assert apart(logits(load(place / "saved", model_on(device)), device), trained) <= CLOSE
            plain = PeftModel.from_pretrained(model_on(device), str(place / "lora"))
            assert apart(logits(plain, device), trained) <= CLOSE
            merged: Any = AutoModelForCausalLM.from_pretrained(place / "merged")
            assert apart(logits(merged.to(device), device), trained) <= CLOSE


@holds
def a_trained_model_is_exported_and_restored(device: torch.device) -> None:
    wanted = logits(model_on(device), device)
    for placement in ("residual", "offset"):
        model = adapt(model_on(device), PissaConfig(rank=4, placement=placement))
        train(model, device)
        for rank in (None, 2):
            export = export_lora(model, rank=rank)
            assert export and all(bool(torch.isfinite(t.cpu()).all()) for t in export.values())
        assert apart(logits(restore(model), device), wanted) <= CLOSE


@holds
def an_embedding_dora_and_adalora_are_adapted(device: torch.device) -> None:
    wanted = logits(model_on(device), device)
    configs = {
        "dora": PissaConfig(rank=4, use_dora=True),
        "adalora": PissaConfig(rank=4, use_adalora=True),
        "embedding": PissaConfig(rank=4, target_modules=["q_proj", "embed_tokens"]),
        "budget": PissaConfig(rank=8, rank_budget=4000, target_modules=["q_proj", "v_proj"]),
    }
    for name, config in configs.items():
        model = adapt(model_on(device), config)
        assert apart(logits(model, device), wanted) <= CLOSE, name
        train(model, device)


@holds
def tokens_are_trained_beside_adapters(device: torch.device) -> None:
    needs_storage(device)
    wanted = logits(model_on(device), device)
    config = PissaConfig(rank=4, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    model = adapt(model_on(device), config)
    assert apart(logits(model, device), wanted) <= CLOSE
    train(model, device)


@holds
def a_loss_decides_which_components_are_trained(device: torch.device) -> None:
    needs_storage(device)
    batch = token_batch(3).to(device)
    wanted = logits(model_on(device), device)
    config = PissaConfig(rank=4, component="scored", target_modules=["q_proj"])
    model = adapt(model_on(device), config, batches=[{"input_ids": batch, "labels": batch}])
    assert apart(logits(model, device), wanted) <= CLOSE


@holds
def a_second_adapter_starts_at_the_base(device: torch.device) -> None:
    wanted = logits(model_on(device), device)
    for placement in ("residual", "offset"):
        model = adapt(model_on(device), PissaConfig(rank=4, placement=placement))
        train(model, device)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        assert apart(logits(model, device), wanted) <= CLOSE


@holds
def a_quantised_residual_trains_and_comes_back(device: torch.device) -> None:
    if find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    needs_storage(device)
    for kind in ("nf4", "int8"):
        base = model_on(device, hidden=64)
        wanted = logits(base, device)
        config = PissaConfig(rank=4, quantization=Quantization(kind, iterations=2))  # pyright: ignore
        model = adapt(base, config)
        start = logits(model, device)
        assert apart(start, wanted) <= 0.3, kind
        train(model, device)
        trained = logits(model, device)
        with reference(model):
            assert apart(logits(model, device), start) <= 0.02, kind
        with folder() as place:
            model.save_pretrained(str(place / "saved"))
            assert apart(logits(load(place / "saved"), torch.device("cpu")), trained.cpu()) <= 0.3, kind
