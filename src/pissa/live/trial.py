"""PEFT's own checks, run before anything is split.

PEFT checks while it wraps, layer by layer, which is after all the splits. So it first wraps a copy of the model that
has modules and no memory: whatever it would refuse later, it refuses now.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from ..errors import TargetError, listed
from .quantized import bits_of

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""How PEFT says that it cannot adapt something."""


def forbidden_by_peft(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Modules that PEFT refuses for what they are called in a model of this type -> its reason."""
    check: Any = getattr(LoraModel, "_check_target_module_compatiblity", None)
    found = {}
    for name in names:
        if check is None:
            break
        try:
            check(None, LoraConfig(), model, name.rpartition(".")[2])
        except REFUSALS as error:
            found[name] = _first_sentence(error)
    return found


def check_by_peft(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Refuse, by PEFT's own words, a configuration that it could not carry out on this model.

    Args:
        model: a base with or without values; it is left alone.
        config: of the adapter.

    Returns:
        The configuration as PEFT completes it for this model: for a classifier it adds the head to `modules_to_save`.

    Raises:
        TargetError: PEFT refuses it.
    """
    twin = _without_memory(model)
    completed = copy.deepcopy(config)
    if twin is None:
        return completed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(twin, completed, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
            lost = _lost_when_loaded(wrapped, completed)
        except REFUSALS as error:
            raise refusal(error) from error
    if lost:
        raise TargetError(
            f"PEFT and transformers would not find the adapters of {listed(lost)} again when they load them: they "
            "take these names for those of an older checkpoint; name the modules in exclude_modules"
        )
    return completed


def _lost_when_loaded(wrapped: Any, config: LoraConfig) -> list[str]:
    """Modules whose adapters PEFT reads under another name than it writes them.

    Args:
        wrapped: the adapted model, without values.
        config: its adapter's.
    """
    written = {
        k: v for k, v in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items() if ".lora_" in k
    }
    read = convert_peft_adapter_state_dict_for_transformers(wrapped, config, dict(written))
    lost = [name for name in written if name not in read or read[name].shape != written[name].shape]
    return list(dict.fromkeys(name.removeprefix("base_model.model.").partition(".lora_")[0] for name in lost))


def refusal(error: Exception) -> TargetError:
    """What PEFT said, as our error."""
    return TargetError(
        f"PEFT cannot adapt this model so: {_first_sentence(error)} Name other target_modules, or name the modules in "
        "exclude_modules"
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _without_memory(model: nn.Module) -> Any:
    """A copy of a model whose tensors are on the meta device; None where it cannot be copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        tensors: list[Any] = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        memo |= {id(tensor): _empty(tensor, keep=bits_of(module) is not None) for tensor in tensors}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # locks, open files, handles of other libraries: what PEFT says is heard when it wraps
        return None


def _empty(tensor: Any, *, keep: bool) -> Any:
    """A tensor like this on the meta device; itself where PEFT looks at how it is quantised."""
    if keep:
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
