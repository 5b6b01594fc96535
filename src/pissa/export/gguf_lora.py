"""A LoRA as one GGUF file, as llama.cpp loads it beside a GGUF of the base (`--lora FILE`).

    general.type "adapter" · adapter.type "lora" · adapter.lora.alpha α · general.architecture, the base's
    NAME.lora_a (r, in) and NAME.lora_b (out, r) for each weight, by its name in the base's GGUF

llama.cpp adds `α / r_W · lora_b · lora_a` to a weight W, with r_W that pair's own rank; it knows neither rsLoRA nor
a module's own alpha. So whatever factor a module has beyond α / r_W is multiplied into its `lora_b`.

Where llama.cpp rotates neighbouring channels of queries and keys while transformers rotates the two halves of a head
(its "llama" family), the rows of the base's projections are interleaved in the GGUF, and so are those of `lora_b`.

The input embedding is looked up, not multiplied: llama.cpp takes rows of its `lora_a`, which is transposed, (vocab, r).
Where the output head is the embedding itself it would multiply by that `lora_a` as well, and ends: refused here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ..checkpoint.disk.write import output_file
from ..checkpoint.scales import scale_of
from ..errors import PissaError, listed
from ..live.marks import check_always_on
from .llama_cpp import check_gguf_target

PREFIX = "base_model.model."
EMBEDDING, OUTPUT = "token_embd", "output"
"""What a GGUF calls the input embedding and the output head."""
WHOLE = "export the whole model instead: --to gguf"


@dataclass(frozen=True)
class _Architecture:
    """What a GGUF makes of one of transformers' model types."""

    name: str
    """In gguf's MODEL_ARCH."""
    interleaved: bool = False
    """Whether the rows of queries and keys are interleaved."""


ARCHITECTURES = {
    "llama": _Architecture("LLAMA", interleaved=True),
    "mistral": _Architecture("LLAMA", interleaved=True),
    "granite": _Architecture("GRANITE", interleaved=True),
    "qwen2": _Architecture("QWEN2"),
    "qwen3": _Architecture("QWEN3"),
    "gemma": _Architecture("GEMMA"),
    "gemma2": _Architecture("GEMMA2"),
    "gemma3_text": _Architecture("GEMMA3"),
    "phi3": _Architecture("PHI3"),
    "gpt2": _Architecture("GPT2"),
}
"""transformers' model type -> GGUF architecture."""


def write_gguf_lora(
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    base_config: Any,
    out: str | os.PathLike[str],
    *,
    template: str | None = None,
) -> None:
    """Write a LoRA as a GGUF file, whole or not at all; fp32.

    Args:
        tensors: PEFT's state dict of a LoRA of linear layers, `…lora_A.weight` (r, in), `…lora_B.weight` (out, r), and
            of the input embedding, `…lora_embedding_A` (r, vocab), `…lora_embedding_B` (hidden, r).
        config: PEFT's configuration that goes with it.
        base_config: transformers' configuration of the base; its weights are not needed.
        out: the file, named .gguf; it must not exist.
        template: the prompt template with which it was trained, which the file's description names.

    Raises:
        ConfigError: see `check_gguf_target`.
        PissaError: an architecture that is not handled here, or tensors that llama.cpp has no place for, all named.
        OutputError: the file exists, or cannot be written.
    """
    check_gguf_target(out)
    check_always_on(config, "a GGUF LoRA")
    import gguf

    text_config = base_config.get_text_config()
    architecture = ARCHITECTURES.get(text_config.model_type)
    if architecture is None:
        raise PissaError(
            f"no GGUF LoRA can be written for a base of type {text_config.model_type}; handled are "
            f"{', '.join(ARCHITECTURES)}; {WHOLE}"
        )
    arch: Any = getattr(gguf.MODEL_ARCH, architecture.name)
    pairs = _pairs(tensors)
    looked_up = {name for name in pairs if f"{PREFIX}{name}.lora_embedding_A" in tensors}
    names = _gguf_names(pairs, looked_up, arch, text_config)
    alpha = float(config.r)
    with output_file(out) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        if template is not None:
            writer.add_description(f"LoRA made with pissa; prompt template: {template}")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (A, B) in sorted(pairs.items()):
            if architecture.interleaved and (heads := _rotated_heads(name, text_config)) is not None:
                B = interleaved_rows(B, heads)
            B = B * (scale_of(config, name) * A.shape[0] / alpha)
            if names[name] == EMBEDDING:
                A = A.T
            writer.add_tensor(f"{names[name]}.weight.lora_a", A.float().contiguous().numpy())
            writer.add_tensor(f"{names[name]}.weight.lora_b", B.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def interleaved_rows(B: Tensor, heads: int) -> Tensor:
    """The rows of each head, first half and second half, taken in turn: 0, h/2, 1, h/2 + 1, …

    Args:
        B: (heads · h, r).
        heads: how many heads the rows are of.
    """
    return B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A, B).

    Raises:
        PissaError: naming every tensor that is no factor of a linear layer.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", key.removeprefix(PREFIX))
        if found is None or tensor.ndim != 2:
            foreign.append(key.removeprefix(PREFIX))
            continue
        sides.setdefault(found[1], {})[found[2] or found[3]] = tensor
    if foreign:
        raise PissaError(
            f"llama.cpp loads LoRAs of linear layers and of the input embedding, and this one also has "
            f"{listed(sorted(foreign), 20)}; {WHOLE}"
        )
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _gguf_names(pairs: Mapping[str, Any], looked_up: set[str], arch: Any, config: Any) -> dict[str, str]:
    """Module name -> its name in the base's GGUF, by gguf's own table.

    Args:
        looked_up: those of the modules that are embeddings, of which llama.cpp adapts the input embedding alone.

    Raises:
        PissaError: naming every module that the base's GGUF does not have.
    """
    import gguf

    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {name: table.get_name(re.sub(r"^model\.language_model\.", "model.", name)) for name in pairs}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    shared = [name for name, found in names.items() if tied and found in (EMBEDDING, OUTPUT)]
    lost = [name for name, found in names.items() if found is None or (name in looked_up and found != EMBEDDING)]
    if lost or shared:
        why = ", whose output head is the embedding itself," if shared else ""
        raise PissaError(
            f"a GGUF of this base{why} has no weight of its own for a LoRA of {listed(sorted(lost + shared), 20)}; "
            f"{WHOLE}"
        )
    return {name: str(found) for name, found in names.items()}


def _rotated_heads(name: str, config: Any) -> int | None:
    """How many heads a projection's rows are of, where they are rotated; None for any other module."""
    if name.endswith(".q_proj"):
        return config.num_attention_heads
    if name.endswith(".k_proj"):
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return None
