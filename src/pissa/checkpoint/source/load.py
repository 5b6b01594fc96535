"""Models, configurations and tokenizers, complete and checked, through transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, listed
from ...live.quantized import keep_unpacked, remember_dtype
from .files import CONFIG, find_weights
from .gptq import is_gptq, load_gptq
from .names import looks_like_path
from .no_foreign_code import model_from, through_transformers
from .reader import check_source, open_source, read_config
from .skeleton import check_size


def load_base(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    kind: str = "AutoModelForCausalLM",
    **options: Any,
) -> Any:
    """A model through transformers, by default a causal language model; the checkpoint's completeness is checked first.

    Args:
        source: a directory or a hub id.
        dtype: of the weights; "auto" for the checkpoint's own.
        kind: name of the class of transformers that loads it.
        options: passed to its `from_pretrained`.

    Raises:
        CheckpointError: the directory is missing, empty, incomplete, or transformers cannot load it; tensors are
            missing or of another shape than config.json says (transformers would draw random ones).
    """
    check_model_directory(source)
    # by default a mismatch is an error that names no tensor
    reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    what = "a language model" if kind == "AutoModelForCausalLM" else "a model"
    if (Path(source) / CONFIG).is_file() and is_gptq(read_config(Path(source))):
        place = options.get("device_map")
        model = load_gptq(source, dtype, place[""] if isinstance(place, dict) else place)
        if model.can_generate():
            _take_generation_settings(model, source)
        return model
    model, report = through_transformers(kind, source, what, dtype=dtype, **{**options, **reporting})
    _check_all_loaded(source, report)
    keep_unpacked(model)
    remember_dtype(model, model.dtype)
    return model


def load_tokenizer(source: str | os.PathLike[str], *, must_end: bool = True) -> Any:
    """The tokenizer that lies with a model.

    Args:
        source: a directory or a hub id.
        must_end: refuse one without an end-of-sequence token, and use that as the padding token where it has none.

    Raises:
        CheckpointError: there is none, it needs code of its own, or it has no end-of-sequence token.
    """
    tokenizer = through_transformers("AutoTokenizer", source, "a tokenizer")
    if not must_end:
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer of {source} has no end-of-sequence token, so no answer could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str | os.PathLike[str]) -> Any:
    """transformers' configuration of a model, without its weights.

    Raises:
        CheckpointError: there is none, or the model needs code of its own.
    """
    return through_transformers("AutoConfig", source, "a configuration")


def without_values(source: str | os.PathLike[str], *, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A causal language model as its configuration describes it, whose values are whatever memory holds.

    To be called where tensors have no memory: on the meta device, or under torch's FakeTensorMode.

    Args:
        source: a directory or a hub id.
        dtype: of the weights.
        attention: how attention is computed; what needs a GPU is taken for "sdpa".

    Raises:
        CheckpointError: there is no configuration, or no such model.
    """
    from transformers import initialization

    plain = attention if attention in (None, "eager", "sdpa") else "sdpa"
    chosen = {"attn_implementation": plain} if plain is not None else {}
    with initialization.no_init_weights():
        model = model_from(
            load_config(source), "AutoModelForCausalLM", source, "a language model", dtype=dtype, **chosen
        )
    model.tie_weights()
    return model


def check_model_directory(source: str | os.PathLike[str]) -> None:
    """Refuse a local model directory that is missing, empty, incomplete or damaged; a hub id passes unchecked.

    Raises:
        CheckpointError: as `open_source`.
    """
    if Path(source).exists() or looks_like_path(source):
        check_source(source)
        if find_weights(Path(source)).form != "gguf":
            with open_source(source) as opened:
                check_size(opened)


def _check_all_loaded(source: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not all the checkpoint's, by transformers' own report (tied ones are there)."""
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    wrong += [
        f"{key} is {tuple(found)} and not {tuple(wanted)}" for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise CheckpointError(
            f"{source} does not hold the weights that its config.json asks for: {listed(wrong, 20)}; "
            "download it again, or correct config.json"
        )


def _take_generation_settings(model: Any, source: str | os.PathLike[str]) -> None:
    """Give a model the settings of generation that lie beside its weights, where there are any."""
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = through_transformers("GenerationConfig", source, "the settings of generation")
