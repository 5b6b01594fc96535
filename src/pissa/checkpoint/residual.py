"""Residuals on disk: what `save_residual` writes, plain transformers loads.

OUT/               the residual as a transformers checkpoint. Quantised, it is a true pre-quantised bitsandbytes one:
                   codes and scales as the split chose them; what is loaded is `split.residual`, bit for bit
OUT/pissa_init/    the initial adapter as a PEFT adapter: residual + pissa_init is the base
OUT/pissa.json     the base, how each module was split and what that cost
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PissaError
from ..live.marks import set_marks
from ..live.quantized import bits_of, keep_unpacked, quantized_layers
from ..live.record import Record, record_of
from ..live.state import INITIAL, active_adapter_name, adapter_layers, has_initial_adapter, without_wrappers
from ..provenance import package_versions
from .card import residual_adapter_card, residual_card, write_card
from .disk.write import check_free, output_directory, write_json
from .factors import WEIGHTS
from .manifest import MANIFEST
from .saved_residual import RESIDUAL
from .seal import described, write_sealed

ADAPTER = "adapter for a residual"
QUANT_STATE = ".quant_state.bitsandbytes__nf4"
LONGEST_FLOAT = len(repr(-2.2250738585072014e-308))


def save_residual(model: PeftModel, out: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Write an adapted model's residual so that `AutoModelForCausalLM.from_pretrained(out)` loads it as it is.

    `PeftModel.from_pretrained(residual, out, subfolder="pissa_init", is_trainable=True)` then gives the model as it
    was at step 0. Adapters that the live model saves from now on name `out` as their base: that is what they
    fit.

    Args:
        model: an adapted model whose weights are residuals; only that note on it is changed.
        out: directory to write, new or empty.
        tokenizer: to be saved beside it.

    Raises:
        PissaError: the weights are the base's own, the adapters are merged, or it is not a transformers model.
        OutputError: `out` holds something already, or cannot be written.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, save_residual
        >>> save_residual(adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8)), "residual")
        >>> model = AutoModelForCausalLM.from_pretrained("residual")  # plain PEFT then loads residual/pissa_init on it
    """
    write_residual(model, out, tokenizer=tokenizer)
    record = _record(model)
    record.residual = os.path.abspath(out)
    for config in model.peft_config.values():
        config.base_model_name_or_path = record.residual


def write_residual(
    model: PeftModel, out: str | os.PathLike[str], *, named: str | None = None, tokenizer: Any = None
) -> None:
    """`save_residual` without a note of it on the model: for a copy that may not stay.

    Args:
        named: what the initial adapter's configuration names as its base; None for where it is written.
    """
    check_free(out)
    record = _record(model)
    plain = _check_residual(model, record)
    with output_directory(out) as partial:
        state = residual_state(plain)
        save_torch_state_dict(state, str(partial), metadata={"format": "pt"})
        _save_config(plain, state, partial)
        initial = INITIAL if has_initial_adapter(model) else None
        if initial is not None:
            write_adapter(model, partial / initial, base=named or os.path.abspath(out), adapter=initial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        rank = record.config.rank if record.config is not None else None
        write_card(partial, residual_card(record.base, record.method, rank, record.certificates, initial))
        write_sealed(partial / MANIFEST, {**_manifest(record), "files": described(partial)})


def write_adapter(model: PeftModel, directory: Path, *, base: str, adapter: str | None = None) -> None:
    """Write an adapter's weights and configuration in PEFT's layout, the rank-r factors as they are.

    Args:
        directory: where; made if need be.
        base: what its configuration names as the model that it fits.
        adapter: the adapter's name; None for the one being trained.
    """
    adapter = adapter or active_adapter_name(model)
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    config: Any = deepcopy(model.peft_config[adapter])
    set_marks(config, base=None)  # it is for this residual and no other model
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(directory))


def write_trained(
    model: PeftModel,
    directory: Path,
    *,
    final: Path,
    residual: str | None = None,
    named: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write an adapter for a saved residual: the rank-r adapter, with a manifest that says what it is for, and a card.

    Args:
        model: whose residual was saved, or loaded from disk.
        directory: where to write.
        final: the name that the directory will have in the end; the residual is found relative to it.
        residual: where the residual lies; None for where it was saved, or loaded from.
        named: what the adapter's configuration names as its base; None for that directory.
        adapter: the adapter's name; None for the one being trained.
    """
    record = _record(model)
    place = residual or record.residual
    assert place is not None
    write_adapter(model, directory, base=named or place, adapter=adapter)
    relative = os.path.relpath(place, final.absolute())
    manifest = {
        "layout": ADAPTER,
        "base": record.base,
        "residual": relative,
        "method": record.method,
        "versions": package_versions(),
    }
    write_json(directory / MANIFEST, manifest)
    config: Any = model.peft_config[adapter or active_adapter_name(model)]
    beside = None if named is not None or relative == RESIDUAL else place
    write_card(directory, residual_adapter_card(config, record.base, record.method, beside))


def residual_state(plain: PreTrainedModel) -> dict[str, Tensor]:
    """A model's own tensors under their own names, without PEFT's; shared ones once."""
    keep_unpacked(plain)
    state: dict[str, Tensor] = {}
    for key, tensor in plain.state_dict().items():
        if ".lora_" in key or ".modules_to_save." in key or not isinstance(tensor, Tensor):
            continue
        name = without_wrappers(key.replace(".original_module.", "."))
        state[name] = stored(name, tensor.detach())
    ties: dict[str, str] = getattr(plain, "all_tied_weights_keys", {})
    for shared, kept in ties.items():
        if shared in state and kept in state:
            del state[shared]
    return unshared(state)


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own, so that a file holds them all."""
    seen: set[int] = set()
    result = {}
    for key, tensor in state.items():
        result[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is written: contiguous, and bitsandbytes' description of a 4-bit weight, which is JSON with the
    mean of the scales in it, of a length that its values have no part in (blanks at the end mean nothing)."""
    if not name.endswith(QUANT_STATE):
        return tensor.contiguous()
    text = bytes(tensor.numpy())
    offset = str(json.loads(text).get("nested_offset", ""))
    blanks = torch.full((LONGEST_FLOAT - len(offset),), ord(" "), dtype=torch.uint8)
    return torch.cat([tensor, blanks]) if offset else tensor.contiguous()


def warn_of_uneven(outputs: Mapping[str, int], form: str) -> None:
    """Say which 4-bit layers transformers alone cannot evaluate on some CPUs.

    Args:
        outputs: layer -> number of outputs. form: of the quantisation.
    """
    uneven = [name for name, count in outputs.items() if form == "nf4" and count % 32]
    if uneven:
        warnings.warn(
            f"{', '.join(uneven)}: the number of outputs is no multiple of 32, so bitsandbytes fails in evaluation "
            "mode on CPUs with AVX512-bf16 when transformers alone loads this; pissa.load does not",
            stacklevel=4,
        )


def _record(model: PeftModel) -> Record:
    record = record_of(model)
    if not isinstance(model, PeftModel) or record is None:
        raise PissaError(f"a model from pissa.adapt or pissa.load is needed, got {type(model).__name__}")
    return record


def _check_residual(model: PeftModel, record: Record) -> PreTrainedModel:
    if not record.quantized and not has_initial_adapter(model):
        raise PissaError("the model's weights are the base's own: there is no residual to save, the base is it")
    if any(layer.merged for layer in adapter_layers(model).values()):
        raise PissaError("the adapters are merged into the weights: call unmerge_adapter() first")
    plain: Any = model.get_base_model()
    if not isinstance(plain, PreTrainedModel):
        raise PissaError(f"{type(plain).__name__} is no transformers model; save its state_dict yourself")
    layers: dict[str, Any] = {**quantized_layers(plain)}
    warn_of_uneven({name: layer.out_features for name, layer in layers.items() if bits_of(layer) == 4}, "nf4")
    return plain


def _save_config(plain: Any, state: dict[str, Tensor], directory: Path) -> None:
    config = deepcopy(plain.config)
    unquantised = [t.dtype for key, t in state.items() if t.is_floating_point() and key.endswith(".weight")]
    config.dtype = unquantised[0] if unquantised else torch.float32
    config.architectures = [type(plain).__name__]
    config.save_pretrained(directory)
    if plain.can_generate() and plain.generation_config is not None:
        plain.generation_config.save_pretrained(directory)


def _manifest(record: Record) -> dict[str, Any]:
    return {
        "layout": RESIDUAL,
        "base": record.base,
        "method": record.method,
        "config": asdict(record.config) if record.config is not None else None,
        "modules": {name: asdict(certificate) for name, certificate in record.certificates.items()},
        **({"polish": record.polish} if record.polish is not None else {}),
        "versions": package_versions(),
    }
