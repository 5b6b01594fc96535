"""In what dtype a checkpoint's weights are read, split and stored."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...split import STORAGE_DTYPES
from ..disk.header import Entry
from ..source.reader import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READABLE = (*STORAGE_DTYPES, torch.float64)


def loading_dtype(source: Source) -> torch.dtype:
    """The dtype in which transformers loads a checkpoint: what config.json says, else that of its first weight.

    Raises:
        CheckpointError: it is none that a weight can be split in.
    """
    said = source.config.get("dtype") or source.config.get("torch_dtype")
    found = getattr(torch, str(said).removeprefix("torch."), None) if said is not None else None
    if found is None:
        floating = [e.dtype for e in source.entries.values() if e.dtype is not None and e.dtype.is_floating_point]
        found = floating[0] if floating else None
    if found not in STORAGE_DTYPES:
        raise CheckpointError(
            f"{source.path} is to be loaded as {said or found}; give --dtype {', '.join(DTYPES)} to split it in another"
        )
    return found


def job_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What transformers loads a module in when it is asked for `dtype`: some are always kept in full precision."""
    kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype != torch.float32 else set()
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    return torch.float32 if any(f".{key}." in f".{name}." for key in kept) else dtype


def conversion(model: PreTrainedModel, key: str, entry: Entry, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a tensor that is copied is converted to first; None where it stays as it is, byte for byte."""
    if dtype is None or entry.dtype not in READABLE:
        return None
    wanted = job_dtype(model, key.removesuffix(".weight"), dtype)
    return None if entry.dtype == wanted else wanted
