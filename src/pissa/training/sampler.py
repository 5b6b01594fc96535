"""The order of the examples: batches of similar length, in an order of their own each epoch.

The order is a function of the seed and the epoch alone, so a run that continues sees what the uninterrupted one would
have seen, and any number of processes that share a batch see the same batch: where the last one cannot be shared
evenly, blank rows, from which nothing is learned, fill it up. (transformers' own sampler of this kind draws from the
global generator, so that a run that continues would see another order.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

GROUPED = "group_by_length"
"""The value of train_sampling_strategy under which rows come in this order."""


class LengthGroupedBatches(Sampler[int]):
    """Indices such that each `batch_size` consecutive ones have similar lengths.

    Batches come in random order (the longest first, so that memory runs out at once or never); an incomplete batch
    comes last, followed by the index of the blank row until the whole is a multiple of `multiple`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, multiple: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0
        self.blanks = -len(lengths) % multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = (torch.randperm(max(len(batches) - 1, 0), generator=generator) + 1).tolist()
        for batch in [*batches[:1], *(batches[i] for i in order), *last]:
            yield from batch
        yield from [len(self.lengths)] * self.blanks
