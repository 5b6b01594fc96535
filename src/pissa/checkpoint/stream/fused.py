"""Weights that transformers makes from several tensors of a checkpoint while it loads it: experts, one below the other.

How they are put together is transformers' own converter's business; this only hands it the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def fused(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Tensor:
    """One parameter from a checkpoint's tensors, by their names there, in the order in which transformers has them.

    A tensor that transformers takes as it stands is given back as it is; one alone may be turned or interleaved too.

    Args:
        model: on whatever device; says by its type how its checkpoints are laid out.
    """
    converter: Any = None
    key = ""
    for name, tensor in tensors.items():
        key, pattern, found = _converter(model, name)
        if found is None:
            return tensor
        converter = converter or deepcopy(found)
        converter.add_tensor(key, name, pattern, tensor)
    (value,) = converter.convert(key, model=model, config=model.config).values()
    return (value[0] if isinstance(value, list) else value).contiguous()


def is_converted(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers would rearrange a checkpoint's tensor of this name while it loads it."""
    return _converter(model, name)[2] is not None


def _converter(model: PreTrainedModel, name: str) -> tuple[str, str | None, Any]:
    """The parameter that a checkpoint's tensor goes to, and by which pattern of which converter."""
    mapping = get_model_conversion_mapping(model)
    renamings: Any = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters: Any = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    if not converters:
        return name, None, None
    state = model.state_dict()
    key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    if key not in state and name in state:
        return name, None, None
    return key, pattern, next((entry for entry in converters if pattern in entry.source_patterns), None)
