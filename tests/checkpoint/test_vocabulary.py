"""Adapters of bases that were enlarged: loaded and merged where the new rows are known, else refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged, load
from pissa.checkpoint.vocabulary import enlarge, rows_of
from pissa.errors import PissaError
from tiny import largest_difference, tiny_llama, train_steps

ROWS = 384 + 5
pytestmark = pytest.mark.filterwarnings("ignore")


def from_disk(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(ROWS - 9, ROWS)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["in full", "noted"])
def test_a_base_that_was_enlarged_is_enlarged_again(tied: bool, kind: str, tmp_path: Path) -> None:
    tiny_llama(tie=tied).save_pretrained(tmp_path / "base")
    model = from_disk(tmp_path / "base")
    if kind == "noted":
        enlarge(model, ROWS)
    else:
        model.resize_token_embeddings(ROWS, mean_resizing=False)
    saved = [] if kind == "noted" else ["embed_tokens", "lm_head"]
    adapted = adapt(model, PissaConfig(4, modules_to_save=saved))
    train_steps(adapted, 2)
    adapted.save_pretrained(str(tmp_path / "run"))
    assert largest_difference(logits(load(tmp_path / "run")), logits(adapted)) < 1e-5
    export_lora(tmp_path / "run", tmp_path / "export")
    assert largest_difference(logits(load(tmp_path / "export")), logits(adapted)) < 1e-5
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = from_disk(tmp_path / "merged")
    assert rows_of(merged) == ROWS and largest_difference(logits(merged), logits(adapted)) < 1e-5


@pytest.mark.parametrize(
    "how", [{"trainable_token_indices": [384, 386]}, {"modules_to_save": ["embed_tokens"]}], ids=["tokens", "one side"]
)
def test_rows_that_nobody_kept_are_asked_for(how: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = from_disk(tmp_path / "base")
    enlarge(model, ROWS)
    del model.__dict__["rows"]  # as resize_token_embeddings leaves it
    adapted = adapt(model, PissaConfig(4, **how))
    train_steps(adapted, 2)
    adapted.save_pretrained(str(tmp_path / "run"))
    for call in (lambda: load(tmp_path / "run"), lambda: export_merged(tmp_path / "run", tmp_path / "merged")):
        with pytest.raises(PissaError, match=r"has 384: enlarge the base.*base=model") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()
    again = from_disk(tmp_path / "base")
    enlarge(again, ROWS)
    assert largest_difference(logits(load(tmp_path / "run", again)), logits(adapted)) < 1e-5


def test_new_rows_are_the_mean_of_the_old_and_the_old_are_untouched() -> None:
    model, before = tiny_llama(), tiny_llama()
    enlarge(model, ROWS)
    for side in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model, side)().weight, getattr(before, side)().weight
        assert torch.equal(new[:384], old)
        torch.testing.assert_close(new[384:], old.mean(0).expand(5, -1))
