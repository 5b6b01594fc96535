"""Exports at real sizes: SmolLM2-135M with an adapter that training moved, and a run of an 8B model's shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from pissa import PissaConfig, adapt, export_lora
from pissa.lab.models import smollm2
from pissa.live.state import adapter_factors
from tiny import largest_difference

pytestmark = pytest.mark.slow
RANK = 16
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""(out, in) of a block's projections in Llama-3-8B, which has 32 blocks."""


def load_base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    tokens = torch.arange(100, 164).view(2, 32)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def seconds(work: Callable[[], object]) -> float:
    """Of this thread, median of five."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    adapted = adapt(load_base(), PissaConfig(RANK))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        batch = torch.randint(0, 49152, (1, 32), generator=torch.Generator().manual_seed(step))
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def test_a_lossless_export_differs_by_at_most_1e_4_in_logits(model: PeftModel, tmp_path: Path) -> None:
    trained = logits(model)
    export_lora(model, tmp_path / "lora")
    base = load_base()
    assert largest_difference(logits(base), trained) > 0.1
    assert largest_difference(logits(PeftModel.from_pretrained(base, str(tmp_path / "lora"))), trained) <= 1e-4


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 24}, {"tolerance": 0.1}])
def test_a_truncation_costs_what_was_predicted(model: PeftModel, settings: dict[str, Any]) -> None:
    export: Any = export_lora(model, **settings)
    for name, f in adapter_factors(model).items():
        assert f.A0 is not None and f.B0 is not None
        change = f.scale * (f.B.double() @ f.A.double() - f.B0.double() @ f.A0.double())
        A, B = (export[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        error = float((B @ A - change).norm() / change.norm())
        assert error == pytest.approx(export.errors[name], rel=0.01, abs=1e-5)
        kept = len(A)
        S = torch.linalg.svdvals(change)[: 2 * RANK]
        assert error == pytest.approx(float(S[kept:].norm() / S.norm()), rel=0.01, abs=1e-5)
        if "tolerance" in settings:
            assert error <= 0.1 and (kept == 1 or S[kept - 1 :].norm() / S.norm() > 0.1)


def test_an_export_takes_milliseconds_in_memory_and_two_seconds_on_disk(model: PeftModel, tmp_path: Path) -> None:
    in_memory = seconds(lambda: export_lora(model))
    numbers = iter(range(100))
    on_disk = seconds(lambda: export_lora(model, tmp_path / str(next(numbers))))
    truncated = seconds(lambda: export_lora(model, rank=RANK))
    print(f"in memory {1e3 * in_memory:.0f} ms, on disk {1e3 * on_disk:.0f} ms, optimal rank {RANK} {truncated:.2f} s")
    assert in_memory < 0.2 and on_disk < 2 and truncated < 20


def test_a_run_of_8b_shapes_is_exported_without_its_base(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for place in ("run", "run/pissa_init"):
        tensors = {}
        for layer in range(32):
            for name, (out, columns) in LLAMA_8B.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
        (tmp_path / place).mkdir()
        save_file(tensors, tmp_path / place / "adapter_model.safetensors", {"format": "pt"})
        targets = [name.rpartition(".")[2] for name in LLAMA_8B]
        LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=targets, base_model_name_or_path="org/an-8b-model"
        ).save_pretrained(str(tmp_path / place))
    start = time.thread_time()
    lossless = export_lora(tmp_path / "run", tmp_path / "lora")
    middle = time.thread_time()
    export_lora(tmp_path / "run", tmp_path / "small", rank=RANK)
    print(f"lossless {middle - start:.1f} s, optimal rank {RANK} {time.thread_time() - middle:.1f} s")
    assert len(lossless) == 2 * 32 * 7 and lossless.base == "org/an-8b-model" and lossless.config.r == 2 * RANK
