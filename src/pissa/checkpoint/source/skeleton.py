"""A model without its weights: built from config.json on the meta device, with what each weight is called on the disk.

Module names, ties, and the names that transformers gives to a checkpoint's tensors while it loads are transformers'
own; nothing is guessed. Tensors that are merged into one parameter while they are loaded (experts, for example) are
split as that parameter; one that becomes several parameters can be copied, not split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ...errors import CheckpointError, listed
from ...outside.limits import LimitError, bounded
from .architecture import named_class
from .reader import Source

SIZES = re.compile(r"layer|block|depth|expert|stage")
"""Fields of a configuration that say how many modules there are."""
BUILD_SECONDS, BUILD_MEMORY = 300.0, 4 << 30
"""What making a model without its weights may take; the largest known ones take seconds."""
LARGER, SMALL = 16, 1 << 26
"""A model may have this many values for each byte of its weights, and this many more: two bits a value are the fewest
that anybody stores, and buffers are not stored at all."""
IGNORED = ("quantization_config", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Names:
    """What a checkpoint's tensors are called in the model."""

    plain: dict[str, str]
    """Model's name -> checkpoint's, one to one."""
    converted: dict[str, str]
    """Checkpoint's name -> the model's parameter that it becomes a part of."""
    fused: dict[str, tuple[str, ...]]
    """Model's name -> the checkpoint's tensors that become this parameter and nothing else, in order."""
    unknown: tuple[str, ...]
    """Names in the checkpoint that the model does not have."""


def build(source: Source, *, buffers: bool = False) -> PreTrainedModel:
    """The model that config.json describes, on the meta device, in evaluation mode, its ties tied.

    Args:
        source: whose config.json it is.
        buffers: whether buffers get their values, so that the model can run once it is given its weights.

    Raises:
        CheckpointError: the configuration is none that transformers knows, or does not fit the weights.
    """
    settings = source.config
    _check_sizes(source, settings)
    known = CONFIG_MAPPING.keys()
    if settings.get("model_type") not in known:
        raise CheckpointError(
            f"{source.path / 'config.json'}: model_type is {settings.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not know; models that bring code of their own are not run"
        )
    try:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(
            {key: value for key, value in settings.items() if key not in IGNORED}
        )
        with ExitStack() as held:
            held.enter_context(bounded(BUILD_SECONDS, BUILD_MEMORY))
            held.enter_context(initialization.no_init_weights())
            if buffers:
                held.enter_context(init_empty_weights(include_buffers=False))
            else:
                held.enter_context(initialization.meta_device_safe_creation_ops())
                held.enter_context(torch.device("meta"))
            model = _model_class(settings, config)(config)
            model.tie_weights()
    except CheckpointError:
        raise
    except LimitError as error:
        raise CheckpointError(
            f"{source.path / 'config.json'}: making its model, without weights, is stopped: {error}; correct its sizes"
        ) from error
    except Exception as error:  # a configuration's fields can be wrong in as many ways as there are models
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{source.path / 'config.json'} describes no model: {reason}") from error
    return model.eval()


def check_size(source: Source) -> None:
    """Refuse a configuration whose model is far larger than its weights: transformers would make it before it compares.

    Args:
        source: the weights, open.

    Raises:
        CheckpointError: naming the largest tensor. A configuration of which no model can be made is not refused here:
            whoever loads it says what is wrong.
    """
    _check_sizes(source, source.config)
    try:
        model = build(source)
    except CheckpointError as error:
        if isinstance(error.__cause__, LimitError):
            raise
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    elements = sum(tensor.numel() for tensor in tensors.values())
    stored = sum(entry.nbytes for entry in source.entries.values())
    if elements > LARGER * stored + SMALL:
        largest = max(tensors, key=lambda name: tensors[name].numel())
        raise CheckpointError(
            f"{source.path / 'config.json'} asks for {elements:,} values, {largest} alone for "
            f"{tuple(tensors[largest].shape)}, and the weights are {stored:,} bytes; correct its sizes"
        )


def checkpoint_names(model: PreTrainedModel, source: Source) -> Names:
    """Map every tensor of a checkpoint to the model's parameter, as transformers would when it loads it.

    Raises:
        CheckpointError: two tensors are one parameter, a parameter has none, or one of another shape.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings: Any = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters: Any = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    plain: dict[str, str] = {}
    converted: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    unknown, twice, supplied = [], [], set()
    for name in sorted(source.entries, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key not in state:
            unknown.append(name)
        elif pattern is not None:
            converted[name] = key
            converter = next(c for c in converters if pattern in c.source_patterns)
            if len(converter.target_patterns) == 1:
                fused[key] = (*fused.get(key, ()), name)
            supplied |= {key.replace(converter.target_patterns[0], target) for target in converter.target_patterns}
        elif key in plain:
            twice.append(f"{plain[key]} and {name}")
        else:
            plain[key] = name
    if twice:
        raise CheckpointError(f"{source.path} holds {listed(twice, 20)}, which are one parameter of the model")
    names = Names(plain, converted, fused, tuple(unknown))
    _check_complete(model, source, names, supplied)
    return names


def _check_complete(model: PreTrainedModel, source: Source, names: Names, supplied: Iterable[str]) -> None:
    """Refuse missing tensors (transformers would draw random ones) and wrong shapes."""
    ties: dict[str, str] = model.all_tied_weights_keys
    there = {*names.plain, *supplied}
    there |= {key for pair in ties.items() if there & {*pair} for key in pair}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    state = model.state_dict()
    wrong = [f"{k} is missing" for k in state if k not in there and not any(p.search(k) for p in optional)]
    for key, name in names.plain.items():
        wanted, found = tuple(state[key].shape), source.entries[name].shape
        if wanted != found:
            wrong.append(f"{name} is {found} and not {wanted}")
    if wrong:
        raise CheckpointError(
            f"{source.path} does not hold the weights that its config.json asks for: {listed(wrong, 20)}; download it "
            "again, or correct config.json"
        )


def _model_class(settings: dict[str, Any], config: Any) -> Any:
    """The class that saved the checkpoint; a language model where config.json does not say."""
    found = named_class(settings.get("architectures"))
    return found or AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportIndexIssue]


def _check_sizes(source: Source, settings: dict[str, Any]) -> None:
    """Refuse a configuration that asks for more modules than there could be, before they are made."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_sizes(source, value)
        elif type(value) is int and SIZES.search(key) and value > 16 * len(source.entries) + 4096:
            raise CheckpointError(
                f"{source.path / 'config.json'}: {key} is {value:,}, and there are {len(source.entries):,} tensors in "
                "all; correct config.json"
            )
