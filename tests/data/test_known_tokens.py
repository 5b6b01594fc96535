"""A tokenizer that is larger than its model is refused by the token that the model does not know, and by no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pissa import adapt, train
from pissa.config import PissaConfig
from pissa.data.known_tokens import check_known, guard_vocabulary, known_to
from pissa.errors import ConfigError
from pissa.evaluation.run import evaluate
from pissa.training.recipe import Recipe
from tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.lists(st.lists(st.integers(0, 300), max_size=5), max_size=4), st.integers(1, 300))
def test_ids_are_refused_exactly_where_one_is_not_known(rows: list[list[int]], known: int) -> None:
    unknown = any(number >= known for row in rows for number in row)
    try:
        check_known(rows, known, TOKENIZER, "m")
    except ConfigError as error:
        assert unknown and f"m knows {known} tokens" in str(error) and "\n" not in str(error)
    else:
        assert not unknown


def test_a_configuration_says_how_many_it_knows() -> None:
    assert known_to(tiny_llama().config) == tiny_llama().config.vocab_size
    assert known_to(object()) is None


@pytest.mark.parametrize("adapted", [False, True])
def test_a_guarded_model_refuses_before_it_fails(adapted: bool) -> None:
    model: Any = tiny_llama()
    known = model.config.vocab_size
    model = adapt(model, PissaConfig(rank=2)) if adapted else model
    guard_vocabulary(model, TOKENIZER, "m")
    assert model(input_ids=torch.tensor([[known - 1]])).logits.shape[-1] == known
    with pytest.raises(ConfigError, match=rf"m knows {known} tokens"):
        model(input_ids=torch.tensor([[0, known]]))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model that knows fewer tokens than the tokenizer beside it."""
    tiny_llama(vocab_size=10).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_training_and_evaluation_say_it_in_one_line(small: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "How many?", "output": f"The answer is: {i}"} for i in range(20)]
    recipe = Recipe(rank=2, max_steps=1, batch_size=2, micro_batch_size=2, learning_rate=1e-3, template="none")
    with pytest.raises(ConfigError, match="knows 10 tokens"):
        train(str(small), rows, tmp_path / "run", recipe, quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "text.txt").write_text("How many are there? " * 20)
    with pytest.raises(ConfigError, match="knows 10 tokens"):
        evaluate(str(small), "perplexity", tmp_path / "text.txt")
