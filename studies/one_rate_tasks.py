"""What the study of one rate trains: three pretrained models, each with something to learn, and where adapters start.

    digits    an MLP that reads MNIST's digits learns them turned by a quarter (random strokes in a quick pass)
    sst-2     MiniLM's last two blocks and a new classifier learn sentiment, over kept states of the blocks below
    llama     the small Llama of `small_lm.py` learns rare kinds of word problems

Every start is a plain LoRA: what it adds at the beginning is taken off the frozen weight, so that all begin at the
same function. With s the scale and W ≈ U·S·Vᵀ,

    start            B0              A0                       B0·A0
    lora             0               Kaiming                  0
    pissa            U·S^½/√s        S^½·Vᵀ/√s                the principal part
    directions, c    √c·U/√s         √c·Vᵀ/√s                 c times an isometry along the principal directions
    random, c        the same along random directions
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pissa.adapted.adapt import adapt
from pissa.config import PissaConfig
from pissa.decompose.svd import truncated_svd
from pissa.live.state import TRAINABLE, adapter_layers, place_at, set_factors
from pissa.split import derive_seed

from .encoder_task import batches as glue_batches
from .encoder_task import encoder_above, glue_rows, outputs
from .fit import fit
from .glue_files import GLUE
from .language import response_mean
from .lm import InMemory, language_task
from .odd_even import digits
from .study import Settings

TASKS = ("digits", "sst-2", "llama")
HIDDEN = 256
ENCODER_BLOCKS = 2


@dataclass(frozen=True)
class Task:
    """A pretrained model and what it is to learn."""

    name: str
    fresh: Callable[[int], Any]
    """Seed -> the pretrained model, to be changed."""
    adapted: str | tuple[str, ...]
    """Target modules."""
    in_full: tuple[str, ...]
    """Modules trained in full."""
    batches: Callable[[int, int], Iterator[Any]]
    """Rows of a step, seed -> batches for ever."""
    loss: Callable[[Any, Any], Tensor]
    held_out: Callable[[Any, int], float]
    """Trained model, seed -> its mean loss on held-out rows."""
    steps: int
    batch: int
    """Rows of a step where nothing else is said."""


def find_task(settings: Settings, name: str) -> Task:
    """A task by its name; see the module.

    Raises:
        PissaError: its data or its model cannot be had.
    """
    return {"digits": _digits, "sst-2": _sentiment, "llama": _llama}[name](settings)


def adapted(task: Task, start: str, rank: int, scale: float, seed: int) -> Any:
    """The task's model with a LoRA at a start; see the module.

    Args:
        task: gives model and targets.
        start: lora, pissa, "directions C" or "random C".
        rank: of every adapter.
        scale: s, alpha over rank.
        seed: of the model, and of what is drawn.
    """
    config = PissaConfig(
        rank,
        alpha=scale * rank,
        method="lora-kaiming",
        target_modules=task.adapted,
        modules_to_save=task.in_full,
        seed=seed,
    )
    model = adapt(task.fresh(seed), config)
    if start != "lora":
        for name, layer in adapter_layers(model).items():
            W = place_at(layer).weight
            A, B = _factors(W.detach(), start, rank, derive_seed(seed, name))
            set_factors(layer, TRAINABLE, A / scale**0.5, B / scale**0.5, trainable=True)
            W.data.sub_(B @ A)
    return model.train()


def _factors(W: Tensor, start: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) at scale 1 for a weight (out, in)."""
    if start == "pissa":
        U, S, Vh, _ = truncated_svd(W, rank)
        return S.sqrt()[:, None] * Vh, U * S.sqrt()
    kind, size = start.split()
    draw = torch.Generator().manual_seed(seed)
    if kind == "random":
        U, V = (torch.linalg.qr(torch.randn(n, rank, generator=draw))[0] for n in W.shape)
        Vh = V.mT
    else:
        U, _, Vh, _ = truncated_svd(W, rank)
    return float(size) ** 0.5 * Vh, float(size) ** 0.5 * U


def _digits(settings: Settings) -> Task:
    use = settings.scale != "quick" and settings.has_data_set("mnist")
    data = str(settings.data_set("mnist")) if use else None

    def parts(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        pixels, labels = turned(data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        first = len(order) * 4 // 5
        return (pixels[order[:first]], labels[order[:first]]), (pixels[order[first:]], labels[order[first:]])

    def batches(size: int, seed: int) -> Iterator[Any]:
        return _drawn(*parts(seed)[0], size, seed)

    @torch.no_grad()
    def held_out(model: Any, seed: int) -> float:
        return float(_image_loss(model.eval(), parts(seed)[1]))

    steps = settings.pick(quick=3, default=80, full=150)
    return Task("digits", lambda seed: _reader(data, seed), ("0", "2"), (), batches, _image_loss, held_out, steps, 32)


def _image_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def _drawn(pixels: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (size,), generator=draw)
        yield pixels[chosen], labels[chosen]


@lru_cache(maxsize=2)
def turned(data: str | None) -> tuple[Tensor, Tensor]:
    """The digits of `odd_even.py`, turned by a quarter."""
    pixels, labels = digits(data)
    side = round(pixels.shape[1] ** 0.5)
    return pixels.unflatten(1, (side, side)).rot90(1, (1, 2)).flatten(1), labels


def _reader(data: str | None, seed: int) -> nn.Module:
    return copy.deepcopy(_pretrained(data, seed))


@lru_cache(maxsize=8)
def _pretrained(data: str | None, seed: int) -> nn.Module:
    """An MLP that reads upright digits."""
    pixels, labels = digits(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (pixels.shape[1], HIDDEN, HIDDEN)
        hidden = [layer for i in (0, 1) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(HIDDEN, 10))
    fit(model, _drawn(pixels, labels, 64, seed), _image_loss, learning_rate=1e-3, steps=400)
    return model


def _sentiment(settings: Settings) -> Task:
    task, rows = GLUE["SST-2"], glue_rows(settings, "SST-2")
    blocks = settings.pick(quick=None, default=ENCODER_BLOCKS, full=ENCODER_BLOCKS)
    inputs = encoder_above(settings, task, blocks, 0)[0]

    def held_out(model: Any, seed: int) -> float:
        labels = torch.tensor([row.label for row in rows[2]]).long()
        return float(cross_entropy(outputs(model, inputs, rows[2]), labels))

    return Task(
        "sst-2",
        lambda seed: encoder_above(settings, task, blocks, seed)[1],
        r".*encoder\.layer.*\.(query|key|value|dense)",
        ("classifier", "pooler"),
        lambda size, seed: glue_batches(rows[0], inputs, size, seed),
        lambda model, batch: model(**batch).loss,
        held_out,
        settings.pick(quick=2, default=60, full=200),
        8,
    )


def _llama(settings: Settings) -> Task:
    memory = InMemory(language_task(settings, held_out=192))

    def batches(size: int, seed: int) -> Iterator[Any]:
        return memory.batches(seed, size)

    return Task(
        "llama",
        lambda seed: memory.copy(),
        "all-linear",
        (),
        batches,
        response_mean,
        lambda model, seed: memory.loss(model),
        memory.task.steps,
        memory.task.batch,
    )
