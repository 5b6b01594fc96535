"""Kinds of layers other than the linear one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from observed import Seen, by_peft, failure, preserved_or_refused, raised
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from tiny import tiny_llama


class Small(nn.Module):
    """One layer under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Any:
        return self.layer(*inputs)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@failure("Convolutions")
def convolutions(_: Path) -> Seen:
    def make() -> Any:
        return seeded(lambda: Small(nn.Conv2d(4, 8, 3, padding=1))).eval()

    kind = raised(lambda: by_peft(make(), rank=2, target_modules=["layer"]), ValueError, AttributeError)
    return Seen(kind, preserved_or_refused(make(), (torch.ones(1, 4, 5, 5),), ["layer"]))


@failure("Embeddings")
def embeddings(_: Path) -> Seen:
    theirs: Any = by_peft(tiny_llama(), target_modules=["embed_tokens"])
    layer: Any = theirs.get_base_model().model.embed_tokens
    factors = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert not all(factor.any() for factor in factors)
    model: Any = tiny_llama()
    ours = preserved_or_refused(Small(model.model.embed_tokens), (torch.arange(9)[None],), ["layer"])
    return Seen("an ordinary LoRA that starts at zero, without a word", ours)


@failure("`nn.MultiheadAttention`")
def attention(_: Path) -> Seen:
    def make() -> Any:
        return seeded(lambda: Small(nn.MultiheadAttention(16, 2, batch_first=True))).eval()

    kind = raised(lambda: by_peft(make(), rank=2, target_modules=["layer"]), AttributeError, ValueError, TypeError)
    x = torch.linspace(-1, 1, 48).view(1, 3, 16)
    return Seen(kind, preserved_or_refused(make(), (x, x, x), ["layer"]))


@failure("Fused experts (`target_parameters`)")
def experts(_: Path) -> Seen:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    more: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "pad_token_id": 0,
    }

    def make() -> Any:
        return seeded(lambda: MixtralForCausalLM(MixtralConfig(**sizes, **more))).eval()

    names = ["mlp.experts.gate_up_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = raised(
            lambda: by_peft(make(), rank=2, target_modules=[], target_parameters=names),
            AttributeError,
            ValueError,
            NotImplementedError,
        )

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = make()

            def forward(self, tokens: Tensor) -> Tensor:
                return self.inner(input_ids=tokens).logits

        ours = preserved_or_refused(Logits(), (torch.arange(1, 9)[None],), names)
    return Seen(kind, ours)
