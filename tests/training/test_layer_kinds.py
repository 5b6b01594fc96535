"""Runs on embeddings and experts: stopped and continued they are the run without a stop, and PEFT loads them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import signal_at_step
from small_runs import log_of, plain_logits, recipe, result_tensors, run

from families import FAMILIES
from pissa import load
from pissa.training.run import Interrupted
from tiny import largest_difference, logits_of, same_tensors, tiny_llama, tiny_tokenizer


def mixture() -> Any:
    family = FAMILIES["qwen-moe"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family.model(family.config(**{**family.sizes, "vocab_size": 384, "max_position_embeddings": 1024}))


BASES: dict[str, tuple[Any, Any]] = {
    "tied embedding": (lambda: tiny_llama(tie=True), ("embed_tokens", "q_proj")),
    "experts": (mixture, "all-linear"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", ["residual", "offset"])
@pytest.mark.parametrize("kind", BASES)
def test_a_run_on_another_kind_of_layer_goes_on_and_is_loaded_by_peft_alone(
    tmp_path: Path, kind: str, placement: Any
) -> None:
    make, targets = BASES[kind]
    base = tmp_path / "base"
    make().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = recipe(target_modules=targets, placement=placement, max_steps=4, rank=2)
    run(base, tmp_path / "whole", settings)
    with pytest.raises(Interrupted):
        signal_at_step(2, lambda: run(base, tmp_path / "stopped", settings), number=signal.SIGTERM)
    run(base, tmp_path / "stopped", settings)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    assert same_tensors(result_tensors(tmp_path / "whole"), result_tensors(tmp_path / "stopped"))
    ours = logits_of(load(tmp_path / "whole"))
    assert largest_difference(plain_logits(base, tmp_path / "whole"), ours) < 1e-4
    assert largest_difference(ours, logits_of(make().eval())) > 1e-3
