"""A small model with random weights of each family of the paper."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 2,
}
QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}

INTERLEAVED: dict[str, Any] = {
    **DECODER,
    "unpadded_vocab_size": 64,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_layers_per_attn_res_block": 1,
}
"""Of a family whose checkpoints hold the halves of an expert's weight one below the other, and its models in turn."""


@dataclass(frozen=True)
class Family:
    """A model of one family, what to adapt in it and what to feed it."""

    config: Callable[..., Any]
    model: Any
    sizes: dict[str, Any]
    adapted: int
    """How many weights, or stacks of them, get an adapter."""
    targets: Any = "all-linear"
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The model, in evaluation; always the same."""
        return deepcopy(self._made)

    @cached_property
    def _made(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(self.config(**self.sizes))
            for parameter in model.parameters():  # biases and norms that do something
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        model.tie_weights()
        return model.eval()

    def batch(self) -> dict[str, Tensor]:
        """Keyword arguments of the forward."""
        generator = torch.Generator().manual_seed(1)
        if "image_size" in self.sizes or self.model is hf.ResNetForImageClassification:
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        return {"input_ids": torch.randint(3, 64, (2, 9), generator=generator)}


IMAGES: dict[str, Any] = {"num_labels": 3}
FAMILIES: dict[str, Family] = {
    "llama": Family(hf.LlamaConfig, hf.LlamaForCausalLM, DECODER, 2 * 7),
    "yi": Family(hf.LlamaConfig, hf.LlamaForCausalLM, {**DECODER, "rms_norm_eps": 1e-5, "rope_theta": 5e6}, 2 * 7),
    "mistral": Family(hf.MistralConfig, hf.MistralForCausalLM, {**DECODER, "sliding_window": 4}, 2 * 7),
    "gemma": Family(hf.GemmaConfig, hf.GemmaForCausalLM, DECODER, 2 * 7),
    "gemma3-embedding": Family(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, DECODER, 2 + 1, ["embed_tokens", "q_proj"]),
    "qwen": Family(hf.Qwen2Config, hf.Qwen2ForCausalLM, DECODER, 2 * 7),
    "mixtral": Family(hf.MixtralConfig, hf.MixtralForCausalLM, {**DECODER, "num_local_experts": 4}, 2 * (4 + 2)),
    "mixtral-router": Family(
        hf.MixtralConfig, hf.MixtralForCausalLM, {**DECODER, "num_local_experts": 4}, 2 * 3, ["gate", "experts"]
    ),
    "mixtral-one-expert": Family(
        hf.MixtralConfig,
        hf.MixtralForCausalLM,
        {**DECODER, "num_local_experts": 1, "num_experts_per_tok": 1},
        2 * (4 + 2),
    ),
    "inkling": Family(hf.Inkling2TextConfig, hf.Inkling2ForCausalLM, INTERLEAVED, 2 * 2, ["experts"]),
    "qwen-moe": Family(hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, {**DECODER, **QWEN_EXPERTS}, 2 * (4 + 2 + 3)),
    "deepseek-moe": Family(hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM, {**DECODER, **LATENT}, 2 * 4 + 3 + 2 + 3),
    "gpt-oss": Family(
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        2 * (4 + 2),
    ),
    "deberta-v3": Family(
        hf.DebertaV2Config,
        hf.DebertaV2ForSequenceClassification,
        {
            **SIZES,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "type_vocab_size": 0,
        },
        2 * 6 + 1,
    ),
    "bert": Family(hf.BertConfig, hf.BertForSequenceClassification, SIZES, 2 * 6 + 1),
    "bert-embeddings": Family(hf.BertConfig, hf.BertForMaskedLM, SIZES, 3, ["word_embeddings", "query"]),
    "vit": Family(
        hf.ViTConfig,
        hf.ViTForImageClassification,
        {**SIZES, **IMAGES, "image_size": 16, "patch_size": 8},
        2 * 6 + 1,
        r".*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|fc1|fc2|projection)",
    ),
    "gpt-2": Family(
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        2 * 4,
    ),
    "gpt-2-embeddings": Family(
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        2 + 2,
        ["wte", "wpe", "c_attn"],
    ),
    "resnet": Family(
        hf.ResNetConfig,
        hf.ResNetForImageClassification,
        {**IMAGES, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
        1 + 2 + 3,
        r".*convolution",
    ),
    "convnext": Family(
        hf.ConvNextConfig,
        hf.ConvNextForImageClassification,
        {**IMAGES, "image_size": 16, "patch_size": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
        2 + 4,
        r".*(patch_embeddings|downsampling_layer\.1|pwconv.)",
    ),
}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What a model says of a batch, in fp64."""
    with torch.no_grad():
        return model(**batch).logits.double()
