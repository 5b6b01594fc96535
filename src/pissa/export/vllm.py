"""What vLLM would say to a LoRA, by its published checks (peft_helper.py, lora_model.py, utils.py in vllm/lora).

It reads the adapter's directory as PEFT writes it. One factor alpha / r holds for every module there, whatever
`rank_pattern` and `alpha_pattern` say: a module with another one would be scaled wrongly without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from ..checkpoint.scales import scale_of

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes; 16 is the default."""
DEFAULT_MAX_LORA_RANK = 16
PREFIX = "base_model.model."
EMBEDDING = (".embed_tokens.lora_embedding_A", ".embed_tokens.lora_embedding_B")


def vllm_refusals(tensors: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """Why vLLM would not load this LoRA, or not as it is meant, each with the way out; empty where it would.

    Args:
        tensors: PEFT's state dict of the export.
        config: PEFT's configuration that goes with it.
    """
    found = []
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        found.append(f"it takes no modules trained in full ({names}): export with --merged")
    if config.trainable_token_indices:
        found.append("it takes no rows of an embedding trained in full (trainable_token_indices): export with --merged")
    if config.use_dora:
        found.append("it takes no DoRA: export with --merged")
    if needed_rank(config) is None:
        found.append(f"rank {_largest(config)} exceeds {MAX_LORA_RANKS[-1]}: export with --rank or --tolerance")
    whole = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors if ".lora_A." in key}
    wrong = sorted(name for name in modules if not math.isclose(scale_of(config, name), whole, rel_tol=1e-6))
    if wrong:
        found.append(
            f"it would scale every module by {whole:g}, which is wrong for {', '.join(wrong[:5])}"
            f"{' and others' if len(wrong) > 5 else ''}: export with --rank {_largest(config)}, whose scales are all 1"
        )
    other = sorted(
        key.removeprefix(PREFIX) for key, tensor in tensors.items() if ".lora_" in key and not _is_taken(key, tensor)
    )
    if other:
        found.append(f"it takes linear layers and embed_tokens, and not {', '.join(other[:5])}: export with --merged")
    return found


def needed_rank(config: LoraConfig) -> int | None:
    """The smallest `--max-lora-rank` that holds the LoRA; None where none does."""
    return next((rank for rank in MAX_LORA_RANKS if rank >= _largest(config)), None)


def _largest(config: LoraConfig) -> int:
    return max([config.r, *(config.rank_pattern or {}).values()])


def _is_taken(key: str, tensor: Tensor) -> bool:
    """Whether a tensor is of a linear layer, or of the input embedding under the name that vLLM knows it by."""
    return tensor.ndim == 2 and key.endswith((".lora_A.weight", ".lora_B.weight", *EMBEDDING))
