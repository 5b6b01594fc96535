"""DeepSpeed's ZeRO-2 and ZeRO-3, two CPU processes over gloo, train what one process trains."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pissa import PissaConfig, adapt
from pissa.errors import PissaError
from pissa.export.lora import export_state
from pissa.live.state import adapter_factors
from tiny import largest_difference, logits_of, tiny_llama, token_batch

SCRIPT = Path(__file__).with_name("zero.py")
CLOSE = 1e-4
with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)


TRAINED = ["2 residual 0.1", "2 offset 0.1", "3 residual 0.1", "3 offset 0"]
REFUSED = "3 offset 0.1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, in two processes that are started once."""
    out = tmp_path_factory.mktemp("zero")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(out), *TRAINED, REFUSED],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=580,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def alone(placement: Any, weight_decay: float) -> tuple[PeftModel, list[float]]:
    """The same steps in one process, and the gradient norms before they were clipped."""
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    trained, norms = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    for step in range(3):
        batch = token_batch(seed=100 + step)
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


@pytest.mark.slow
@pytest.mark.timeout(600)
@with_deepspeed
@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_train_as_one_does(case: str, runs: Path) -> None:
    _, placement, weight_decay = case.split()
    model, norms = alone(placement, float(weight_decay))
    seen = torch.load(runs / case / "seen.pt")
    assert largest_difference(logits_of(model), logits_of(tiny_llama())) > 1e-2
    assert seen["norms"] == pytest.approx(norms, rel=1e-3)
    assert largest_difference(seen["trained"], logits_of(model)) < CLOSE
    exported = PeftModel.from_pretrained(tiny_llama(), str(runs / case / "lora"))
    assert largest_difference(logits_of(exported), seen["trained"]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
@with_deepspeed
def test_weight_decay_of_an_offset_adapter_is_refused_where_nothing_can_be_put_back(runs: Path) -> None:
    assert "set weight_decay to 0" in (runs / REFUSED / "error.txt").read_text()
    assert not (runs / REFUSED / "lora").exists()


def test_a_step_with_parameters_that_were_replaced_is_refused_before_it() -> None:
    model = adapt(tiny_llama(), PissaConfig(4, placement="offset"))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())  # as fully_shard does
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = token_batch()
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(PissaError, match="freeze_second_halves") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_a_half_that_an_optimizer_s_own_copy_moves_is_put_back_before_it_is_used() -> None:
    model = adapt(tiny_llama(), PissaConfig(4, placement="offset")).eval()
    expected, factors = logits_of(model), adapter_factors(model)
    start = {name: f.B0.clone() for name, f in factors.items() if f.B0 is not None}
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            second = parameter.shape[0] // 2 if parameter.shape[0] == 8 else parameter.shape[1] // 2
            (parameter[second:] if parameter.shape[0] == 8 else parameter[:, second:]).mul_(0.5)
    export_state(model)
    for name, f in adapter_factors(model).items():
        assert f.B0 is not None and torch.equal(f.B0, start[name])
    assert torch.equal(logits_of(model), expected)


def test_a_state_dict_without_the_frozen_parameters_is_refused() -> None:
    model = adapt(tiny_llama(), PissaConfig(4))
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(PissaError, match="frozen parameters included"):
        export_state(model, state=state)
