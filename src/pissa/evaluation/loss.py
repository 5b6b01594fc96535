"""What a model loses on held-out examples: cross-entropy of the response tokens, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.conversation import Example
from ..data.encode import Collator, Encoded, encode
from ..data.prompts import Template
from ..training.loss import token_losses


@dataclass(frozen=True)
class HeldOutLoss:
    """Losses of single examples, so that two models can be compared example by example."""

    nats: list[float]
    """Summed over an example's response tokens, in the order of the examples."""
    tokens: list[int]
    """How many tokens each sum runs over."""

    @property
    def mean(self) -> float:
        """Nats per response token, over all of them."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def by_example(self) -> list[float]:
        """Nats per response token of each example."""
        return [nats / tokens for nats, tokens in zip(self.nats, self.tokens, strict=True)]


def held_out_loss(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template = "auto",
    max_length: int = 512,
    batch_size: int = 8,
) -> HeldOutLoss:
    """The loss that training would see on these examples, without a gradient.

    Args:
        model: a causal language model of transformers, or a PeftModel around one; evaluated in evaluation mode, and
            left in the mode that it was in.
        tokenizer: its tokenizer.
        examples: as `read_examples` gives them.
        template: the prompt template that the model was trained with.
        max_length: tokens per example; what is longer is cut.
        batch_size: examples at once, neighbours in length.

    Raises:
        DataError: no examples, or examples of which nothing is left after the cut.
    """
    encoded = encode(examples, tokenizer, template=template, max_length=max_length)
    training = model.training
    model.eval()
    try:
        return _measured(model, tokenizer.pad_token_id, encoded, batch_size)
    finally:
        model.train(training)


@torch.no_grad()
def _measured(model: Any, pad_id: int | None, encoded: Encoded, batch_size: int) -> HeldOutLoss:
    nats, tokens = [0.0] * len(encoded), [0] * len(encoded)
    collate = Collator(pad_id if pad_id is not None else 0)
    order = sorted(range(len(encoded)), key=lambda index: encoded.lengths[index], reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collate([encoded[i] for i in chosen]).items()}
        losses, rows = token_losses(model, model.get_output_embeddings(), batch)
        for place, index in enumerate(chosen):
            own = losses[rows == place]
            nats[index], tokens[index] = float(own.double().sum()), len(own)
    return HeldOutLoss(nats, tokens)
