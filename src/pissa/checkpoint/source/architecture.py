"""Which class of transformers a checkpoint is of: what its config.json names, as nothing else can know it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ...errors import CheckpointError

DEFAULT = "AutoModelForCausalLM"
"""For a config.json that names none."""
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "SEQ_CLS": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "TOKEN_CLS": ("AutoModelForTokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
}
"""PEFT's name of a task -> transformers' class that loads a model for it, and the classes that are for it."""
WITHOUT_NEW_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Tasks whose model has only the base's own weights."""


def named_class(architectures: Any) -> type[PreTrainedModel] | None:
    """The class that saved a checkpoint; None where config.json names none.

    Args:
        architectures: of config.json, whatever that is.

    Raises:
        CheckpointError: transformers has no such class, or derives models from it.
    """
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(first, str) or first.startswith("_"):
        return None
    found = getattr(transformers, first, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"config.json names the architecture {first[:80]!r}, which transformers {transformers.__version__} does "
            "not have"
        )
    if found.__init__ is PreTrainedModel.__init__:
        raise CheckpointError(
            f"config.json names the architecture {first!r}, from which transformers derives models and which is none "
            "itself; name the model's own class"
        )
    return found


def class_for(architectures: Any, task: str | None, trained: str | None, where: str) -> str:
    """The name of the class of transformers that loads the base of an adapter.

    Args:
        architectures: of the base's config.json.
        task: PEFT's name of what the adapter was trained for, where its configuration says it.
        trained: the class that it was trained on, where its configuration says it.
        where: the adapter, for messages.

    Raises:
        CheckpointError: the base's config.json names a model for something else, to which a head was added in training.
    """
    try:
        named = named_class(architectures)
    except CheckpointError:  # transformers may know its model_type under another class
        named = None
    known = getattr(transformers, trained, None) if trained is not None and not trained.startswith("_") else None
    if isinstance(known, type) and issubclass(known, PreTrainedModel) and known is not named:
        if named is not None:
            raise CheckpointError(_other_class(where, f"on a {trained}", named.__name__))
        return known.__name__
    if task in TASKS:
        auto, classes = TASKS[task]
        if named is None or named.__name__ in classes.values():
            return named.__name__ if named is not None else auto
        if task in WITHOUT_NEW_HEAD:
            return auto
        raise CheckpointError(_other_class(where, f"for {task}", named.__name__))
    return named.__name__ if named is not None else DEFAULT


def _other_class(where: str, trained: str, named: str) -> str:
    return (
        f"{where} was trained {trained}, and the base's config.json names a {named}: build the model as it was before "
        "it was adapted, and pass it: load(path, base=model)"
    )
