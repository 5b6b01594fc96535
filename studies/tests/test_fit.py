"""The training loop against a loop written by hand, with its schedules, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pissa.errors import ConfigError, DataError
from studies.fit import Diverged, fit


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(8, 4, generator=generator), "y": torch.randn(8, 3, generator=generator)} for _ in range(count)
    ]


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def share_of_the_rate(schedule, done, steps, warmup):
    """By hand: a straight rise, then a straight fall, half a cosine, or no fall at all."""
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_is_adamw_with_clipped_gradients_and_a_schedule(schedule, warmup_ratio):
    ours, by_hand, steps = linear(), linear(), 6
    warmup = math.ceil(steps * warmup_ratio)
    seen = fit(
        ours, batches(steps), loss, learning_rate=1e-2, steps=steps, schedule=schedule, warmup_ratio=warmup_ratio
    )
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0)
    for step, batch in enumerate(batches(steps)):
        value = loss(by_hand, batch)
        optimizer.zero_grad()
        value.backward()
        norm = torch.cat([p.grad.flatten() for p in by_hand.parameters() if p.grad is not None]).norm()
        for parameter in by_hand.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, float(1 / (norm + 1e-6))))
        optimizer.param_groups[0]["lr"] = 1e-2 * share_of_the_rate(schedule, step, steps, warmup)
        optimizer.step()
        assert seen.losses[step] == pytest.approx(float(value.detach()), rel=1e-5)
        assert seen.grad_norms[step] == pytest.approx(float(norm), rel=1e-5)
    assert torch.allclose(ours.weight, by_hand.weight, atol=1e-6)


def test_what_is_frozen_stays():
    frozen = linear()
    model = nn.Sequential(frozen, nn.Linear(3, 3))
    frozen.requires_grad_(False)
    before = frozen.weight.clone()
    done = []
    fit(model, batches(3), loss, learning_rate=0.1, steps=3, after_step=done.append)
    assert torch.equal(frozen.weight, before)
    assert done == [1, 2, 3]


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="after 2 of 3 steps"):
        fit(linear(), batches(2), loss, learning_rate=0.1, steps=3)
    with pytest.raises(ConfigError, match="no parameter"):
        fit(linear().requires_grad_(False), batches(1), loss, learning_rate=0.1, steps=1)
    with pytest.raises(ConfigError, match="learning_rate is 0"):
        fit(linear(), batches(1), loss, learning_rate=0, steps=1)
    with pytest.raises(ConfigError, match="steps is 0"):
        fit(linear(), batches(1), loss, learning_rate=0.1, steps=0)
    with pytest.raises(ConfigError, match="schedule is 'step'"):
        fit(linear(), batches(1), loss, learning_rate=0.1, steps=1, schedule="step")  # pyright: ignore[reportArgumentType]


def test_divergence_names_the_step_and_keeps_those_before() -> None:
    bad = {"x": torch.full((8, 4), float("nan")), "y": torch.zeros(8, 3)}
    with pytest.raises(Diverged, match="in step 3") as stopped:
        fit(linear(), [*batches(2), bad], loss, learning_rate=0.1, steps=3, schedule="constant")
    assert stopped.value.seen == fit(linear(), batches(2), loss, learning_rate=0.1, steps=2, schedule="constant")
