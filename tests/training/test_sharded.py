"""Two processes over gloo, replicated (DDP) or sharded (FSDP2's fully_shard), train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pissa import PissaConfig, adapt
from pissa.live.offset import second_half
from pissa.live.state import adapter_layers
from tiny import largest_difference, logits_of, tiny_llama, train_steps
from training.sharded import optimizer_of

pytestmark = pytest.mark.slow
CLOSE = 1e-4
SCRIPT = Path(__file__).with_name("sharded.py")


def alone(placement: Any, name: str) -> PeftModel:
    """The same steps in one process."""
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    train_steps(model, 3, optimizer=optimizer_of(model, name))
    return model


@pytest.mark.parametrize("name", ["adamw", "spectral"])
@pytest.mark.parametrize("placement", ["residual", "offset"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(engine: str, placement: str, name: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), engine, placement, name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen, model = torch.load(tmp_path / "seen.pt"), alone(placement, name)
    base = logits_of(tiny_llama())
    assert largest_difference(logits_of(model), base) > 1e-2
    assert largest_difference(seen["trained"], logits_of(model)) < CLOSE
    assert largest_difference(seen["reference"], base) < 1e-5
    exported = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    assert largest_difference(logits_of(exported), seen["trained"]) < 1e-5
    if placement == "offset":
        start = adapt(tiny_llama(), PissaConfig(4, placement="offset"))
        for name, layer in adapter_layers(start).items():
            for dimension, side in enumerate(("lora_A", "lora_B")):
                initial: Any = getattr(layer, side)["default"]
                now = seen["state"][f"base_model.model.{name}.{side}.default.weight"]
                assert torch.equal(second_half(now, dimension), second_half(initial.weight.detach(), dimension))
