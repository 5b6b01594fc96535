"""The model of an evaluation, from whatever holds one: a model, a run, an export, a split."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapted.load import load
from ..checkpoint.factors import CONFIG
from ..checkpoint.read import read_adapter
from ..checkpoint.recorded import recorded_template
from ..checkpoint.saved_residual import residual_at
from ..checkpoint.source.load import check_model_directory, load_base, load_tokenizer
from ..checkpoint.source.look import nothing_in
from ..checkpoint.source.names import looks_like_path
from ..checkpoint.source.no_foreign_code import through_transformers
from ..data.known_tokens import guard_vocabulary
from ..data.prompts import Template
from ..errors import CheckpointError
from ..live.record import record_of
from ..outside.documents import Unreadable, parse_object, read_bounded

CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Any
    """In evaluation mode, without gradients, on the accelerator where there is one."""
    tokenizer: Any
    """The tokenizer that lies with it, else its base's."""
    template: Template | None
    """The prompt template that it was trained with, where that is recorded."""


def load_subject(
    source: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, classes: int | None = None
) -> Subject:
    """A model with its tokenizer: a causal language model, or where `classes` is given and it is one, a classifier.

    Args:
        source: a model's directory or hub id, a run, a checkpoint inside one, an export, or what `pissa init` wrote.
        base: of an adapter, where it records none or the recorded one has moved.
        classes: outputs that a sequence-classification model should have; None for causal models alone.

    Raises:
        CheckpointError: there is no such thing, or it is incomplete, or no tokenizer is found.
    """
    split = residual_at(source, ask=True)
    source = split.path if split is not None else source
    path = Path(source)
    adapter = path.is_dir() and ((path / CONFIG).is_file() or split is not None)
    if path.is_dir() and not adapter and not (path / "config.json").is_file():
        raise CheckpointError(nothing_in(path))
    if base is not None and not adapter:
        raise CheckpointError(f"{source} is a whole model, so it has no base; leave --base out")
    kind = CLASSIFIER if classes is not None and _classifies(path) else CAUSAL
    if adapter and kind == CLASSIFIER:
        adapter_base = base or read_adapter(path).base
        if adapter_base is None:
            raise CheckpointError(f"{path} does not record its base; give --base")
        base = adapter_base
        model: Any = load(path, _without_head(adapter_base, classes))
    else:
        model = load(path, base) if adapter else load_base(source, kind=kind)
    model = model.eval().requires_grad_(False)
    if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
        model = model.to("cuda")
    place = _tokenizer_place(path, model, base)
    tokenizer = load_tokenizer(place, must_end=kind == CAUSAL)  # a classifier's text need not end
    guard_vocabulary(model, tokenizer, source)
    return Subject(model, tokenizer, recorded_template(path))


def _classifies(path: Path) -> bool:
    """Whether a directory says that its model, or its adapter's, classifies sequences."""
    for name, key in (("config.json", "architectures"), (CONFIG, "task_type")):
        try:
            said = parse_object(read_bounded(path / name)).get(key)
        except Unreadable:
            continue
        if said == "SEQ_CLS" or "ForSequenceClassification" in str(said):
            return True
    return False


def _without_head(base: str | os.PathLike[str], classes: int | None) -> Any:
    """An encoder under a new head, whose weights the adapter brings."""
    check_model_directory(base)
    return through_transformers("AutoModelForSequenceClassification", base, "a classifier", num_labels=classes)


def _tokenizer_place(path: Path, model: Any, base: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """The directory or hub id that a tokenizer comes from: the nearest to the source that has one."""
    if not path.is_dir():
        return path if looks_like_path(path) else str(path)
    record = record_of(model)
    recorded = record.base if record is not None else None
    configs = getattr(model, "peft_config", {}).values()
    named = [config.base_model_name_or_path for config in configs]
    for place in (path, base, *named, recorded):
        if place and any((Path(place) / name).is_file() for name in TOKENIZER_FILES):
            return place
    return next((place for place in (base, recorded, *named) if place), path)
