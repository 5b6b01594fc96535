"""A multimodal model trains on text, and what text does not go through is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import log_of, recipe, run
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from pissa.training.text_part import beside_text, for_text
from tiny import tiny_llama, tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def seeing() -> Any:
    tokens: dict[str, Any] = {"image_token_index": 380, "boi_token_index": 381, "eoi_token_index": 382}
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    )


def test_what_is_beside_the_text_is_named() -> None:
    assert beside_text(seeing()) == ["model.vision_tower", "model.multi_modal_projector"]
    assert beside_text(tiny_llama()) == []


def test_a_recipe_that_says_what_to_adapt_stays() -> None:
    for settings in (recipe(target_modules=("q_proj",)), recipe(exclude_modules=("v_proj",))):
        assert for_text(seeing(), settings) is settings


@pytest.mark.filterwarnings("ignore")
def test_a_multimodal_model_trains_on_text_and_goes_on(tmp_path: Path) -> None:
    base = tmp_path / "base"
    seeing().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = recipe(max_steps=2, save_every=1)
    result = run(base, tmp_path / "whole", settings)
    names = [name for name, parameter in result.model.named_parameters() if parameter.requires_grad]
    assert names and all(".language_model." in name for name in names)
    assert result.results["losses"][-1] < result.results["losses"][0]
    assert len(log_of(tmp_path / "whole")) == 2
