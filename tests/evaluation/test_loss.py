"""Held-out losses against transformers' own loss, one example at a time."""

from __future__ import annotations

import pytest
import torch

from pissa.data.encode import encode
from pissa.data.rows import examples_from_rows
from pissa.evaluation.loss import held_out_loss
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def examples():
    rows = [{"question": "How many?" * n, "answer": f"There are {n} in all. The answer is: {n}"} for n in (5, 1, 9, 2)]
    return examples_from_rows(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_losses_are_those_of_transformers(examples, batch_size):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer)).train()
    found = held_out_loss(model, tokenizer, examples, batch_size=batch_size)
    assert model.training
    encoded = encode(examples, tokenizer, template="auto", max_length=512)
    for index in range(len(examples)):
        row = {name: torch.tensor([values]) for name, values in encoded[index].items()}
        with torch.no_grad():
            expected = float(model.eval()(**row).loss)
        assert found.nats[index] / found.tokens[index] == pytest.approx(expected, rel=1e-5)
    assert found.mean == pytest.approx(sum(found.nats) / sum(found.tokens))
