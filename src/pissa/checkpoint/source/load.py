"""Models and tokenizers through transformers: the one place where another library loads what is on a disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import CheckpointError, MissingExtraError
from ...live.quantized import keep_unpacked, remember_dtype
from .hub import first_line, looks_like_path
from .reader import check_source


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
    import transformers

    check_model_directory(source)
    # by default a mismatch is an error that names no tensor
    reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = getattr(transformers, kind).from_pretrained(source, dtype=dtype, **{**options, **reporting})
    except ImportError as error:
        if "bitsandbytes" not in str(error):
            raise
        raise MissingExtraError(f"{source} is quantised with bitsandbytes: pip install 'pissa[quant]'") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(_cannot_load("a language model", source, error)) from error
    model, report = loaded
    _check_all_loaded(source, report)
    keep_unpacked(model)
    remember_dtype(model, model.dtype)
    return model


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies with a model; its padding token is set to the end-of-sequence token where it has none.

    Raises:
        CheckpointError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_cannot_load("a tokenizer", source, error)) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer of {source} has no end-of-sequence token, so no answer could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_directory(source: str | os.PathLike[str]) -> None:
    """Refuse a local model directory that is missing, empty, incomplete or damaged; a hub id passes unchecked.

    Raises:
        CheckpointError: as `open_source`.
    """
    if Path(source).exists() or looks_like_path(source):
        check_source(source)


def _cannot_load(what: str, source: str | os.PathLike[str], error: Exception) -> str:
    if Path(source).exists():
        return f"cannot load {what} from {source}: {first_line(error)}"
    return f"there is no directory {source}, and as a hub id it cannot be loaded: {first_line(error)}"


def _check_all_loaded(source: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not all the checkpoint's, by transformers' own report (tied ones are there)."""
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    wrong += [
        f"{key} is {tuple(found)} and not {tuple(wanted)}" for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        rest = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{source} does not hold the weights that its config.json asks for: {', '.join(wrong[:20])}{rest}; "
            "download it again, or correct config.json"
        )
