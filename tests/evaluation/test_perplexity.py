"""Perplexity equals a plain loop over tokens; overlapping windows count every token once."""

from __future__ import annotations

import math

import pytest
import torch

from pissa.errors import ConfigError, DataError
from pissa.evaluation.perplexity import perplexity, windows_of
from tiny import tiny_llama

IDS = torch.randint(0, 384, (50,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize(("window", "stride"), [(50, 50), (20, 20), (20, 7), (60, 60), (2, 1)])
def test_perplexity_is_that_of_a_plain_loop(window: int, stride: int) -> None:
    model = tiny_llama()
    losses: dict[int, float] = {}
    for start in range(0, len(IDS), stride):
        part = torch.tensor([IDS[start : start + window]])
        with torch.no_grad():
            logs = model(input_ids=part).logits[0].double().log_softmax(-1)
        for i in range(1, part.shape[1]):
            losses.setdefault(start + i, -float(logs[i - 1, part[0, i]]))
    found = perplexity(model, IDS, window=window, stride=stride)
    assert found.tokens == len(losses)
    assert found.value == pytest.approx(math.exp(sum(losses.values()) / len(losses)), rel=1e-5)


def test_overlapping_windows_count_every_token_but_the_first_once() -> None:
    counted = [t for _, stop, fresh in windows_of(103, 20, 6) for t in range(stop - fresh, stop)]
    assert counted == list(range(1, 103))


def test_some_windows_only_and_the_mode_is_put_back() -> None:
    model, seen = tiny_llama().train(), []
    found = perplexity(model, IDS, window=10, count=2, step=lambda: seen.append(model.training))
    assert (found.tokens, len(found.losses), seen) == (18, 2, [False, False])
    assert model.training


def test_what_cannot_be_measured_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="window 1"):
        perplexity(model, IDS, window=1)
    with pytest.raises(ConfigError, match="stride 11"):
        perplexity(model, IDS, window=10, stride=11)
    with pytest.raises(DataError, match="0 windows"):
        perplexity(model, IDS[:1])
    with pytest.raises(DataError, match="5 windows; asked for 6"):
        perplexity(model, IDS, window=10, count=6)
