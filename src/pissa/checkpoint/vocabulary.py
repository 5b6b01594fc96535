"""Models with more tokens than their base has rows for.

An adapter whose tokenizer got new tokens was trained on a base that was enlarged first. The base on the disk was not.
Where the new rows are known it is enlarged again while it is loaded: they were trained in full and lie in the
adapter's file, or `pissa train --resize-embeddings` made them, each the mean of the base's own, and noted how many.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listed
from ..live.marks import ROWS, marks
from .factors import PREFIX
from .read import SavedAdapter


def rows_of(model: nn.Module) -> int | None:
    """How many tokens a model has embeddings for; None where it has no embedding."""
    embedding = _embedding(model, "get_input_embeddings")
    return None if embedding is None else embedding.weight.shape[0]


def enlarge(model: nn.Module, rows: int) -> None:
    """Give a model's embeddings, the input's and the output's, this many rows; new ones are the mean of the old.

    Args:
        model: one of transformers; its adapters say afterwards that it was enlarged.
        rows: more than it has.
    """
    runtime: Any = model
    before = {side: _embedding(model, side) for side in ("get_input_embeddings", "get_output_embeddings")}
    means = {side: e.weight.detach().float().mean(0) for side, e in before.items() if e is not None}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        old = rows_of(model) or 0
        runtime.resize_token_embeddings(rows, mean_resizing=False)
        for side, mean in means.items():
            after: Any = _embedding(model, side)
            if after is not None and after.weight.shape[0] == rows:
                after.weight[old:] = mean.to(after.weight)
                if getattr(after, "bias", None) is not None:
                    after.bias[old:] = after.bias[:old].float().mean().to(after.bias)
    runtime.__dict__[ROWS] = rows


def fit_vocabulary(path: str | os.PathLike[str], saved: SavedAdapter, model: nn.Module, base: object) -> None:
    """Enlarge a base to the vocabulary that an adapter was trained with, where its new rows are known.

    Args:
        path: of the adapter, for messages.
        saved: the adapter.
        model: the base, without adapters.
        base: where it comes from, for messages.

    Raises:
        CheckpointError: they are not known, or the adapter holds tensors that this model has no place for.
    """
    own, wanted = rows_of(model), rows_needed(saved, model)
    if own is not None and wanted > own:
        if not (marks(saved.config).get(ROWS) == wanted or _holds_all(saved, model, wanted)):
            raise CheckpointError(
                f"{path} was trained with an embedding of at least {wanted} rows, and its base {base or ''} has {own}: "
                "enlarge the base as it was before it was adapted (resize_token_embeddings) and pass it: "
                "load(path, base=model)"
            )
        enlarge(model, wanted)
    _check_places(path, saved, model)


def rows_needed(saved: SavedAdapter, model: nn.Module) -> int:
    """How many rows an adapter's base has to have, as far as the adapter says; 0 where it says nothing."""
    counts = [marks(saved.config).get(ROWS) or 0]
    sizes = _sizes(saved.others)
    counts += [sizes[name][0] for name in _embedding_weights(model) if name in sizes]
    tokens: Any = saved.config.trainable_token_indices or []
    lists = tokens.values() if isinstance(tokens, Mapping) else [tokens]
    return max([*counts, *(index + 1 for ids in lists for index in ids)])


def _holds_all(saved: SavedAdapter, model: nn.Module, rows: int) -> bool:
    """Whether the embeddings of both sides were trained in full and are in the adapter's file. (PEFT takes tied ones
    apart when it trains one of them.)"""
    sizes, names = _sizes(saved.others), _embedding_weights(model)
    return bool(names) and all(sizes.get(name, (0,))[0] == rows for name in names)


def _check_places(path: str | os.PathLike[str], saved: SavedAdapter, model: nn.Module) -> None:
    """Refuse tensors trained in full that a model has no place for; PEFT would leave them out without a word."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [n for n, size in _sizes(saved.others).items() if ".token_adapter." not in n and state.get(n) != size]
    if wrong:
        raise CheckpointError(
            f"{path} was made for another base: {listed(wrong, 20)} missing there or of another shape; build the "
            "model as it was before it was adapted, and pass it: load(path, base=model)"
        )


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in tensors.items()}


def _embedding_weights(model: nn.Module) -> list[str]:
    """The names of the weights of a model's input and output embeddings."""
    found = [_embedding(model, side) for side in ("get_input_embeddings", "get_output_embeddings")]
    return [f"{name}.weight" for name, module in model.named_modules() if any(module is e for e in found)]


def _embedding(model: nn.Module, side: str) -> Any:
    get = getattr(model, side, None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # models without tokens
        return None
    return found if isinstance(found, nn.Embedding | nn.Linear) else None
