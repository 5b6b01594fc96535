"""Weights and models of given shapes, random, with spectra that decay as those of trained weights do.

A matrix is white noise plus a head of an eighth of its smaller side whose singular values fall like 1/sqrt(i), made on
the device in two products: seven billion of them take about a second there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .sizes import ModelShape

HEAD = 8.0
"""The largest singular value of the head, in units of the noise's."""
SIZE = 0.02
"""Standard deviation of the noise in a model's weights, as models are initialised."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decaying(shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random (m, n) matrix on the generator's device."""
    m, n = shape
    k = max(1, min(m, n) // 8)
    device = generator.device
    noise, left, right = (
        torch.randn(*size, generator=generator, device=device, dtype=dtype) for size in ((m, n), (m, k), (k, n))
    )
    index = torch.arange(1, k + 1, device=device, dtype=torch.float32)
    decay = HEAD * index.rsqrt() * max(m, n) ** -0.5
    return noise.addmm_(left * decay.to(dtype), right)


def random_llama(shape: ModelShape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of this shape on the device, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    refill(model, seed)
    return model.eval()


@torch.no_grad()
def refill(model: nn.Module, seed: int = 0) -> None:
    """Give every matrix of a model a new random value, in place: linears a decaying spectrum, the others noise."""
    for number, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim != 2:
            continue
        generator = torch.Generator(weight.device).manual_seed(1000 * seed + number)
        if name.removesuffix(".weight").rpartition(".")[2] in LINEARS:
            weight.copy_(decaying((weight.shape[0], weight.shape[1]), generator, weight.dtype).mul_(SIZE))
        else:
            weight.normal_(0, SIZE, generator=generator)


def tokens(shape: ModelShape, rows: int, length: int, device: torch.device, seed: int = 0) -> Tensor:
    """(rows, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocabulary, (rows, length), generator=generator).to(device)


def in_products(model: nn.Module) -> int:
    """How many of a model's parameters are multiplied with each token: all but the rows of the input embedding."""
    runtime: Any = model
    embedding = runtime.get_input_embeddings().weight
    return sum(parameter.numel() for parameter in model.parameters() if parameter is not embedding)
