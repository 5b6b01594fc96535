"""The loss of labelled tokens, with the vocabulary projection computed nowhere else: it is a quarter of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.encode import IGNORED


def response_loss(model: Any, head: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy over the labelled tokens, with logits computed nowhere else.

    Args:
        model: a causal language model, possibly wrapped.
        head: its output projection, whose input is (batch, length, hidden).
        inputs: input_ids and labels, each (batch, length), and what else the model takes, such as attention_mask; label
            t is predicted at t − 1.

    Returns:
        The sum in nats, fp32, and the number of tokens it runs over.
    """
    losses, _ = token_losses(model, head, inputs)
    return losses.sum(), len(losses)


def token_losses(model: Any, head: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every labelled token, with logits computed nowhere else.

    Args:
        model, head, inputs: see `response_loss`.

    Returns:
        The losses in nats, fp32, and the row of the batch that each belongs to; both (tokens,).
    """
    targets = next_labels(inputs["labels"])
    learned = targets != IGNORED
    others = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
    with only_at(head, learned):
        logits = model(**others, use_cache=False).logits
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[learned], reduction="none")
    return losses, learned.nonzero()[:, 0]


def next_labels(labels: Tensor) -> Tensor:
    """For each position the label that is predicted there: that of the next one, -100 at the last; (batch, length)."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


@contextmanager
def only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let a projection see the hidden states of these positions only; logits are then (positions, vocabulary).

    Args:
        head: the projection.
        positions: bool, (batch, length).
    """
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][positions], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def backbone_gives(backbone: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let a model's backbone give the hidden states of these positions only, as one row: (1, positions, hidden).

    Args:
        backbone: the model without its head, which returns a `ModelOutput`.
        positions: bool, (batch, length).
    """

    def chosen(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[positions][None]
        return output

    handle = backbone.register_forward_hook(chosen)
    try:
        yield
    finally:
        handle.remove()
