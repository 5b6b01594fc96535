"""The order is a function of seed and epoch, similar lengths lie together, and processes share batches evenly."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from pissa.training.sampler import LengthGroupedBatches
from tiny import global_generators

BATCH = 8


def lengths(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(5, 500) for _ in range(count)]


def batches(sampler: LengthGroupedBatches) -> list[list[int]]:
    return [*BatchSampler(sampler, sampler.batch_size, drop_last=False)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 90),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    multiple=st.integers(1, 8),
)
def test_every_epoch_has_each_row_once_then_blanks(count: int, size: int, seed: int, epoch: int, multiple: int) -> None:
    sampler = LengthGroupedBatches(lengths(count), size, seed, multiple=multiple)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order[:count]) == list(range(count))
    assert order[count:] == [count] * (-count % multiple)
    assert len(order) == len(sampler) and len(order) % multiple == 0


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedBatches(lengths(50), BATCH, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    before = global_generators()
    first = order(3, 1)
    assert global_generators() == before
    torch.manual_seed(2)
    assert order(3, 1) == first
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    again = LengthGroupedBatches(lengths(50), BATCH, 3)
    again.set_epoch(1)
    assert list(again) == first == list(again)


@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_hold_similar_lengths_the_longest_first_the_incomplete_last(epoch: int) -> None:
    sizes = lengths(403)
    sampler = LengthGroupedBatches(sizes, BATCH, seed=0)
    sampler.set_epoch(epoch)
    found = batches(sampler)
    assert [len(batch) for batch in found] == [BATCH] * 50 + [3]
    assert max(sizes) in (sizes[i] for i in found[0])
    # shuffled rows would have a mean spread of about 385 of the 495 that there are
    spreads = [max(sizes[i] for i in batch) - min(sizes[i] for i in batch) for batch in found]
    assert sum(spreads) / len(spreads) < 60
    # the batches themselves do not come in order of length
    means = [sum(sizes[i] for i in batch) for batch in found[1:-1]]
    falling = sum(a >= b for a, b in pairwise(means))
    assert 10 < falling < 40


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [8, 13, 16, 33])
def test_any_number_of_processes_sees_the_same_batches(count: int, processes: int) -> None:
    micro = BATCH // processes // 2
    alone = batches(LengthGroupedBatches(lengths(count), BATCH, seed=5))
    shared = LengthGroupedBatches(lengths(count), BATCH, seed=5, multiple=micro * processes)
    parts = BatchSampler(shared, micro, drop_last=False)
    shards: list[list[list[int]]] = []
    for rank in range(processes):
        shard: Any = BatchSamplerShard(parts, processes, rank)  # pyright: ignore[reportArgumentType]
        shards.append(list(shard))
    assert len({len(shard) for shard in shards}) == 1
    for step, batch in enumerate(alone):
        seen = [i for shard in shards for part in shard[2 * step : 2 * step + 2] for i in part if i < count]
        assert sorted(seen) == sorted(batch)


def test_one_row_is_an_epoch() -> None:
    assert batches(LengthGroupedBatches([7], BATCH, seed=0)) == [[0]]
