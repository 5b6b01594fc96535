"""The fine-tuned model without an adapter: what training changed is added to the base's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.attached import attach_saved
from ..checkpoint.card import merged_card, write_card
from ..checkpoint.companions import base_files, copy_companions
from ..checkpoint.disk.write import check_free, output_directory
from ..checkpoint.read import base_place, read_adapter
from ..checkpoint.recorded import record_template
from ..checkpoint.residual import unshared
from ..checkpoint.stream.merge import merge_saved
from ..errors import PissaError, listed
from ..live.factors import merged_weight
from ..live.layers import TRANSPOSED, Place, place_of
from ..live.marks import check_always_on
from ..live.quantized import quantized_layers
from ..live.record import record_of
from ..live.state import adapter_factors, adapter_layers, is_offset, place_at, without_wrappers
from ..split import STORAGE_DTYPES
from .from_model import check_finite, exportable

TOKENS = ".token_adapter."
"""What PEFT puts into the names of an embedding some of whose rows are trained."""


def export_merged(
    model_or_dir: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
) -> None:
    """Write the fine-tuned model as a plain transformers checkpoint, adapter merged, in the base's dtype.

    Args:
        model_or_dir: an adapted model (left as it is), or a saved run or adapter directory, whose base is read and
            merged weight by weight and never held; one with adapted experts is loaded whole.
        out: directory to write, new or empty.
        base: the base's directory or hub id, for a saved adapter that does not record it.

    Raises:
        PissaError: the model is not one of transformers, or its adapter is no plain LoRA.
        CheckpointError, OutputError: what is read is incomplete, or `out` cannot be written.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, export_merged
        >>> export_merged(adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8)), "merged")
        >>> model = AutoModelForCausalLM.from_pretrained("merged")
    """
    check_free(out)
    if not isinstance(model_or_dir, PeftModel) and merge_saved(model_or_dir, out, base):
        return
    model = model_or_dir if isinstance(model_or_dir, PeftModel) else attach_saved(model_or_dir, base)
    plain: Any = model.get_base_model()
    if not isinstance(plain, PreTrainedModel):
        raise PissaError(f"{type(plain).__name__} is no transformers model; export_lora works for any module")
    with output_directory(out) as partial:
        merged_config: Any = deepcopy(plain.config)
        state = merged_state(model)
        if _ties_broken(plain, state):
            merged_config.tie_word_embeddings = False
        if not getattr(merged_config, "tie_word_embeddings", False):
            state = unshared(state)
        if hasattr(merged_config, "quantization_config"):
            del merged_config.quantization_config
        _save_plain(plain, merged_config, state, partial)
        record, template = record_of(model), None
        if not isinstance(model_or_dir, PeftModel):
            saved = read_adapter(model_or_dir, base)
            template = saved.template
            record_template(partial, saved.base, template)
            place, _ = base_place(model_or_dir, saved, base)
            copy_companions(*base_files(place), model_or_dir, partial)
        if record is not None:
            write_card(partial, merged_card(record.base, record.method, template))


def merged_state(model: PeftModel) -> dict[str, Tensor]:
    """The base model's state dict with every adapter added to its weight and PEFT's own names taken out."""
    adapter = exportable(model)
    check_always_on(model.peft_config[adapter], "a merged model")
    factors, layers = adapter_factors(model, adapter), adapter_layers(model)
    adapted = {place_at(layers[name]).key(name): name for name in factors}
    state: dict[str, Tensor] = {}
    plain = model.get_base_model()
    quantized = {without_wrappers(n): m for n, m in quantized_layers(plain).items()}
    for key, tensor in plain.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        if ".modules_to_save." in key:
            if f".modules_to_save.{adapter}." not in key:
                continue
            key = key.replace(f".modules_to_save.{adapter}.", ".")
        if TOKENS in key:
            key, _, own = key.partition(TOKENS)
            if not own.startswith("base_layer."):
                continue
            wrapper: Any = plain.get_submodule(key)
            key = f"{key}.{own.removeprefix('base_layer.')}"
            tensor = wrapper.token_adapter.get_merged_weights([adapter]).detach() if own.endswith("weight") else tensor
        key = without_wrappers(key)
        key = f"{key.removesuffix('qweight')}weight" if key.endswith(".qweight") else key
        name, _, kind = key.rpartition(".")
        owner = key.partition(".weight.")[0] if ".weight." in key else name
        if owner in quantized and kind not in ("weight", "bias"):
            continue  # scales, which the dequantised weight has in it
        if key in adapted:
            place, f = place_at(layers[adapted[key]]), factors[adapted[key]]
            if tensor.dtype not in STORAGE_DTYPES and name not in quantized:
                raise PissaError(
                    f"cannot merge into {name}, which is stored as {tensor.dtype}: load the base unquantised"
                )
            f = f.folded()
            merged = merged_weight(place.matrices(), f.change() if is_offset(model, adapter) else f)
            check_finite({key: merged}, "the merged weight")
            tensor = _stored(place, merged)
        elif kind == "weight" and name in quantized:
            place = place_of(quantized[name])
            tensor = _stored(place, place.matrices())
        state[key] = tensor
    return state


def _stored(place: Place, matrices: Tensor) -> Tensor:
    """A weight as the merged model stores it: a layer of bitsandbytes as the one that it replaced."""
    replaced = getattr(place.module, "source_cls", None)
    kind = TRANSPOSED if isinstance(replaced, type) and issubclass(replaced, Conv1D) else place.kind
    return kind.stored(matrices, place.shape)


def _ties_broken(model: Any, state: dict[str, Tensor]) -> bool:
    """Whether weights that the base shares came out different."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return any(not torch.equal(state[a], state[b]) for a, b in ties.items() if a in state and b in state)


def _save_plain(model: Any, config: Any, state: dict[str, Tensor], directory: Path) -> None:
    """Save through an empty twin of the base, so that the live model keeps its adapters."""
    with torch.device("meta"):
        twin = type(model)(config)
    twin.load_state_dict(state, strict=False, assign=True)
    twin.tie_weights()
    left = [name for name, parameter in twin.named_parameters() if parameter.is_meta]
    if left:
        raise PissaError(f"cannot merge: no weight for {listed(left, 20)}")
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = model.generation_config
    twin.save_pretrained(directory)
