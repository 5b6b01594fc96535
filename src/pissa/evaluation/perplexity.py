"""How well a language model predicts a text.

    perplexity = exp(−mean over tokens of ln p(token | the tokens before it in its window))

The text is cut into windows. With a stride below the window's length, windows overlap, and each token counts once: in
the first window that holds it, so that it has more of its past before it. The first token of the text has no past and
does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, DataError


@dataclass(frozen=True)
class Perplexity:
    """What was measured."""

    value: float
    """The perplexity."""
    tokens: int
    """Tokens that counted."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood of each window's tokens, in nats, for paired comparisons."""


def perplexity(
    model: Any,
    ids: Sequence[int],
    *,
    window: int = 512,
    stride: int | None = None,
    count: int | None = None,
    step: Callable[[], object] = lambda: None,
) -> Perplexity:
    """The perplexity of a causal language model on a text, in evaluation mode.

    Args:
        model: takes `input_ids` and returns `.logits`; its mode is put back afterwards.
        ids: the text's tokens.
        window: tokens that the model sees at a time, at least 2.
        stride: tokens from one window's start to the next; None for `window`, no overlap.
        count: measure this many windows at even distances; None for all.
        step: called after each window.

    Raises:
        ConfigError: a window or stride that cannot be.
        DataError: a text shorter than two tokens or than `count` windows.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ConfigError(f"window {window} and stride {stride}: give a window of at least 2 and a stride from 1 to it")
    spans = list(windows_of(len(ids), window, stride))
    if not spans or (count is not None and not 1 <= count <= len(spans)):
        raise DataError(f"the text of {len(ids)} tokens has {len(spans)} windows; asked for {count or 'at least 1'}")
    if count is not None:
        spans = [spans[i * len(spans) // count] for i in range(count)]
    total, tokens, losses, training = 0.0, 0, [], model.training
    try:
        model.eval()
        for start, stop, fresh in spans:
            loss = window_loss(model, ids[start:stop], fresh)
            total, tokens = total + loss * fresh, tokens + fresh
            losses.append(loss)
            step()
    finally:
        model.train(training)
    return Perplexity(math.exp(total / tokens), tokens, tuple(losses))


def windows_of(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, how many of the last tokens count) of each window; the first token of a window never counts."""
    counted = 1
    for start in range(0, max(length - 1, 0), stride):
        stop = min(start + window, length)
        fresh = min(stop - counted, stop - start - 1)
        if fresh > 0:
            yield start, stop, fresh
            counted = stop
        if stop == length:
            return


@torch.no_grad()
def window_loss(model: Any, ids: Sequence[int], fresh: int) -> float:
    """Mean negative log-likelihood of a window's last `fresh` tokens."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    logits = model(input_ids=tokens).logits[0, -fresh - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, -fresh:]))
