"""The weights that studies of single matrices look at: real ones, of models small enough for a laptop."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pissa.config import PissaConfig
from pissa.errors import CheckpointError
from pissa.lab.inspection.layers import block_of, matrices_of, select_targets
from pissa.lab.load import load_model
from pissa.lab.models import MINILM, minilm

from .language import language_model
from .study import Settings

WIDTH_PER_RANK = 32
"""The paper's LLaMA-2-7B: width 4096, rank 128."""


def models(settings: Settings) -> tuple[list[str], str]:
    """The model that was asked for; else SmolLM2 and MiniLM, in a quick pass a tiny random one.

    Returns:
        Directories or hub ids, and what the study's figures must say of a model that could not be had (mostly "").
    """
    sources = [language_model(settings)]
    if settings.scale == "quick" or settings.model is not None:
        return sources, ""
    try:
        return [*sources, str(minilm())], ""
    except CheckpointError as error:
        return sources, (
            f"; {MINILM} was left out: {error}, or run `python -c 'from pissa.lab.models import minilm; "
            "print(minilm())'` where there is a network and put the folder that it names into $PISSA_CACHE here"
        )


@lru_cache(maxsize=1)
def loaded(source: str) -> dict[str, tuple[Tensor, int]]:
    """Layer -> its matrix (out, in) and the rank for it at the paper's share of the width."""
    model = load_model(source, dtype=torch.float32)
    rank = max(1, model.config.hidden_size // WIDTH_PER_RANK)
    targets = select_targets(model, PissaConfig(rank=rank), None)
    return {name: (W.float(), min(rank, *W.shape)) for target in targets for name, W in matrices_of(target)}


def spread(source: str, blocks: int | None) -> list[str]:
    """The layers of so many blocks at even distances, the first among them; None for all of them."""
    names = list(loaded(source))
    found = list(dict.fromkeys(block for name in names if (block := block_of(name))))
    if blocks is None or not found:
        return names
    count = min(blocks, len(found))
    kept = {found[i * len(found) // count] for i in range(count)}
    return [name for name in names if block_of(name) in kept]
