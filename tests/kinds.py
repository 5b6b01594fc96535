"""One small model for each kind of layer, and what an adapter of it is tried with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """Fused experts; each token goes through one of them."""

    def __init__(self, *, transposed: bool = False, experts: int = 5) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(experts, 12, 8), (experts, 8, 6)]
        first, second = (shape[:1] + shape[:0:-1] if transposed else shape for shape in shapes)
        self.gate_up_proj = nn.Parameter(torch.empty(first))
        self.down_proj = nn.Parameter(torch.empty(second))

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        first, second = self.gate_up_proj[choice], self.down_proj[choice]
        if self.is_transposed:
            first, second = first.mT, second.mT
        gate, up = torch.einsum("noi,ni->no", first, x).chunk(2, dim=-1)
        return torch.einsum("noi,ni->no", second, nn.functional.silu(gate) * up)


class Mixture(nn.Module):
    """Experts and the router that chooses among them, which has a weight of its own and no kind of layer."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        self.gate = self.Router()
        self.experts = Experts(transposed=transposed)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).float().softmax(-1)
        best, choice = scores.max(-1)
        return self.head(best[:, None].to(x.dtype) * self.experts(x, choice))


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0])


class Encoder(nn.Module):
    """torch's own encoder, whose fast path in evaluation reads its children's weights without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Tied(nn.Module):
    """An embedding that is the output head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3 has it: the scale is in the forward."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def chain(*modules: nn.Module) -> nn.Module:
    """Modules one after the other, under the names 0, 1, …"""
    return nn.Sequential(*modules)


@dataclass(frozen=True)
class Case:
    """A model with one kind of layer in it."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    """As the user names them."""
    names: tuple[str, ...]
    """What is adapted."""
    shape: tuple[int, ...]
    """Of the input; of token ids where `tokens` says how many there are."""
    tokens: int = 0
    plain_peft: Literal["same", "refused", "merges wrongly", "forwards wrongly"] = "same"
    """What plain PEFT makes of the exported adapter."""
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """The model with random weights, in evaluation; equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            for parameter in model.parameters():
                fan = parameter[0].numel() if parameter.ndim > 1 else 4
                nn.init.normal_(parameter, std=fan**-0.5)
        return model.to(dtype).eval()

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """An input."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(0, self.tokens, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


IMAGE, SIGNAL, VOLUME, SEQUENCE = (2, 4, 9, 9), (2, 4, 11), (1, 3, 5, 6, 5), (2, 5, 8)
CASES: dict[str, Case] = {
    "linear": Case(lambda: chain(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)), ("0", "2"), ("0", "2"), (4, 6)),
    "conv1d-gpt2": Case(lambda: chain(Conv1D(9, 6), nn.GELU(), nn.Linear(9, 5)), ("0",), ("0",), (4, 6)),
    "embedding": Case(lambda: chain(nn.Embedding(11, 8), nn.Linear(8, 4)), ("0",), ("0",), (2, 7), 11),
    "embedding-scaled": Case(lambda: chain(ScaledEmbedding(11, 8), nn.Linear(8, 4)), ("0",), ("0",), (2, 7), 11),
    "embedding-tied": Case(Tied, ("embed",), ("embed",), (2, 7), 11, "merges wrongly"),
    "embedding-and-head": Case(Tied, ("embed", "head"), ("embed", "head"), (2, 7), 11, "merges wrongly"),
    "conv1d": Case(lambda: chain(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU()), ("0",), ("0",), SIGNAL),
    "conv2d": Case(lambda: chain(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1)), ("0", "2"), ("0", "2"), IMAGE),
    "conv2d-stride": Case(
        lambda: chain(nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 2), bias=False)), ("0",), ("0",), IMAGE
    ),
    "conv2d-same": Case(lambda: chain(nn.Conv2d(4, 6, 3, padding="same")), ("0",), ("0",), IMAGE),
    "conv2d-dilated": Case(
        lambda: chain(nn.Conv2d(4, 6, 3, dilation=2, padding=2)), ("0",), ("0",), IMAGE, plain_peft="refused"
    ),
    "conv2d-dilated-same": Case(
        lambda: chain(nn.Conv2d(4, 6, 3, dilation=(1, 2), padding="same")), ("0",), ("0",), IMAGE, plain_peft="refused"
    ),
    "conv1d-dilated-1": Case(lambda: chain(nn.Conv1d(4, 6, 1, dilation=3)), ("0",), ("0",), SIGNAL),
    "conv3d": Case(lambda: chain(nn.Conv3d(3, 4, 2, padding=1)), ("0",), ("0",), VOLUME),
    "attention": Case(Attention, ("attn",), ("attn",), SEQUENCE),
    "attention-seq-first": Case(lambda: Attention(batch_first=False, bias=False), ("attn",), ("attn",), SEQUENCE),
    "encoder": Case(
        Encoder, ("self_attn", "linear1"), ("layer.self_attn", "layer.linear1"), SEQUENCE, plain_peft="forwards wrongly"
    ),
    "experts": Case(Mixture, ("experts",), ("experts.gate_up_proj", "experts.down_proj"), (9, 8)),
    "experts-transposed": Case(
        lambda: Mixture(transposed=True), ("experts",), ("experts.gate_up_proj", "experts.down_proj"), (9, 8)
    ),
    "experts-ranks": Case(
        Mixture,
        ("experts", "head"),
        ("experts.gate_up_proj", "experts.down_proj", "head"),
        (9, 8),
        settings={"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_up_proj": 5.0}},
    ),
    "router": Case(Mixture, ("gate",), ("gate",), (9, 8)),
}
