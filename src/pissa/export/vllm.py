"""What vLLM would say to a LoRA, by the checks that its release CHECKED makes (peft_helper.py, lora_model.py, utils.py
in vllm/lora).

It reads the adapter's directory as PEFT writes it, `rank_pattern`, `alpha_pattern` and rsLoRA included. What it has no
layer for, and what changes the meaning of an adapter beyond a plain LoRA, it refuses when the adapter is loaded.
`make test-clients` holds these verdicts against its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from ..errors import listed

CHECKED = "0.32.0"
"""The release of vLLM whose checks these are."""
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes; 16 is the default."""
PREFIX = "base_model.model."
EMBEDDING = (".embed_tokens.lora_embedding_A", ".embed_tokens.lora_embedding_B")
HEADS = ("classifier", "score")
"""Modules trained in full that it takes: the head of a classifier, one of them."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Names of starting points after which a saved adapter is a LoRA for the base itself."""
FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "biases in its factors (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
"""Fields of PEFT's configuration that it refuses when they are set -> what they are called."""


def vllm_refusals(tensors: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """Why vLLM would not load this LoRA, each with the way out; empty where it would.

    Args:
        tensors: PEFT's state dict of the export.
        config: PEFT's configuration that goes with it.
    """
    found = [f"it takes no {name}: export with --merged" for field, name in FEATURES.items() if _is_set(config, field)]
    if config.bias != "none":
        found.append(f"it takes no trained biases (bias={config.bias!r}): export with --merged")
    saved = config.modules_to_save or []
    if len(saved) > 1 or any(name not in HEADS for name in saved):
        found.append(f"it takes no modules trained in full ({', '.join(saved)}): export with --merged")
    if config.trainable_token_indices:
        found.append("it takes no rows of an embedding trained in full (trainable_token_indices): export with --merged")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        found.append(f"it takes no adapter whose base PEFT changes as it loads (init_lora_weights={start!r}): --merged")
    if needed_rank(config) is None:
        found.append(f"rank {_largest(config)} exceeds {MAX_LORA_RANKS[-1]}: export with --rank or --tolerance")
    other = sorted(
        key.removeprefix(PREFIX) for key, tensor in tensors.items() if ".lora_" in key and not _is_taken(key, tensor)
    )
    if other:
        found.append(f"it takes linear layers and embed_tokens, and not {listed(other)}: export with --merged")
    return found


def needed_rank(config: LoraConfig) -> int | None:
    """The smallest `--max-lora-rank` that holds the LoRA; None where none does."""
    return next((rank for rank in MAX_LORA_RANKS if rank >= _largest(config)), None)


def _largest(config: LoraConfig) -> int:
    return max([config.r, *(config.rank_pattern or {}).values()])


def _is_set(config: LoraConfig, field: str) -> bool:
    return bool(getattr(config, field, None))


def _is_taken(key: str, tensor: Tensor) -> bool:
    """Whether a tensor is of a linear layer, or of the input embedding under the name that vLLM knows it by. (A DoRA's
    magnitudes are refused with it.)"""
    return key.endswith((*EMBEDDING, ".lora_magnitude_vector")) or (
        tensor.ndim == 2 and key.endswith((".lora_A.weight", ".lora_B.weight"))
    )
