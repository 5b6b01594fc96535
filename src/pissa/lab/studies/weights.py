"""The weights that studies of single matrices look at: real ones, of models small enough for a laptop."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...config import PissaConfig
from ..inspect_layers import block_of, matrices_of, select_targets
from ..load import load_model
from ..models import cache_directory, smollm2
from .language import RUNS, tiny_model
from .study import Settings

WIDTH_PER_RANK = 32
"""The paper's LLaMA-2-7B: width 4096, rank 128."""
MINILM = "all-minilm-l6-v2"


def models(settings: Settings) -> list[str]:
    """The model that was asked for; else SmolLM2, and MiniLM where it is at hand."""
    if settings.model is not None:
        return [settings.model]
    if settings.scale == "quick":
        return [str(tiny_model(settings.out / RUNS / "tiny-llama"))]
    minilm = cache_directory() / MINILM
    return [str(smollm2()), *([str(minilm)] if (minilm / "config.json").is_file() else [])]


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
