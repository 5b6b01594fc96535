"""How large everything in the pass is: one table, in full and in tiny, so that the same code runs on both."""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = 32
"""Decoder layers of LLaMA-2-7B and of LLaMA-3-8B."""


@dataclass(frozen=True)
class ModelShape:
    """What of a Llama's configuration decides the shapes of its weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of every stage."""

    name: str
    """"full" or "tiny"."""
    matrices: tuple[tuple[int, int, int], ...]
    """(out, in, how many) of the linears that are decomposed."""
    rank: int
    """Of the decompositions and of `adapt`."""
    batch: int
    """Equally shaped matrices that are decomposed at once."""
    repeats: int
    """Timed repetitions of what is quick; the median is reported."""
    rival_matrices: int
    """Matrices of each shape that a rival is timed on; its seconds are scaled to all of them."""
    adapted: ModelShape
    """The model that `adapt` and PEFT initialise."""
    rival_layers: int
    """Decoder layers that PEFT's `pissa_niter_*` initialises; its seconds are scaled to all of them."""
    trained: ModelShape
    """The model of the training steps."""
    trained_rank: int
    """Rank of the adapters in training."""
    rows: int
    """Sequences in a training batch."""
    length: int
    """Tokens in a sequence."""
    steps: int
    """Timed training steps, after one that is not."""
    checked: ModelShape
    """The model whose function is compared before and after saving, loading and exporting."""
    patience: float
    """Factor on the stages' limits and on the whole budget: a CPU that others use as well is no GPU."""
    product: int
    """Side of the square bf16 matrices whose product gives the device's rate."""


FULL = Sizes(
    name="full",
    matrices=((4096, 4096, 4 * LAYERS), (11008, 4096, 2 * LAYERS), (4096, 11008, LAYERS)),
    rank=128,
    batch=8,
    repeats=3,
    rival_matrices=4,
    adapted=ModelShape(4096, 11008, LAYERS, 32, 32, 32000),
    rival_layers=4,
    trained=ModelShape(4096, 14336, LAYERS, 32, 8, 128256),
    trained_rank=16,
    rows=2,
    length=2048,
    steps=3,
    checked=ModelShape(2048, 5632, 4, 16, 8, 32000),
    patience=1.0,
    product=8192,
)

TINY = Sizes(
    name="tiny",
    matrices=((64, 64, 4), (172, 64, 2), (64, 172, 2)),
    rank=8,
    batch=2,
    repeats=2,
    rival_matrices=1,
    adapted=ModelShape(64, 128, 2, 4, 2, 128),
    rival_layers=1,
    trained=ModelShape(64, 128, 2, 4, 2, 128),
    trained_rank=4,
    rows=2,
    length=16,
    steps=1,
    checked=ModelShape(64, 128, 2, 4, 2, 128),
    patience=5.0,
    product=128,
)

SIZES = {sizes.name: sizes for sizes in (FULL, TINY)}
