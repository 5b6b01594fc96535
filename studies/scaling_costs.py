"""The cost of initialisation, measured: single SVDs, whole checkpoints of random weights, and the machine's speed."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoint.disk.write import output_directory
from pissa.checkpoint.stream.init import init_checkpoint
from pissa.config import PissaConfig
from pissa.decompose.svd import truncated_svd
from pissa.lab.memory import peak_gib, start_peak

from .scaling_shapes import RANK, SMALL, TINY, Shape

LOW_RANK = 48


def weight_like(m: int, n: int, generator: torch.Generator) -> Tensor:
    """(m, n): noise and a low-rank part whose singular values fall slowly, as in pretrained weights."""
    strengths = 0.02 * (m**0.5 + n**0.5) * torch.arange(1, LOW_RANK + 1).pow(-0.5)
    left = torch.randn(m, LOW_RANK, generator=generator) / m**0.5 * strengths
    right = torch.randn(LOW_RANK, n, generator=generator) / n**0.5
    return torch.randn(m, n, generator=generator).mul_(0.02).addmm_(left, right)


def svd_seconds(m: int, n: int, rank: int, seed: int) -> dict[str, Any]:
    """CPU seconds of one truncated SVD, all threads together."""
    W = weight_like(m, n, torch.Generator().manual_seed(seed))
    start = time.process_time()
    found = truncated_svd(W, rank, seed=seed)
    seconds = time.process_time() - start
    return {"seconds": seconds, "algorithm": found.certificate.algorithm}


def init_seconds(name: str, scratch: Path) -> dict[str, Any]:
    """`init_checkpoint` of a new checkpoint in bf16: CPU seconds and peak memory."""
    shape = TINY if name == "tiny" else SMALL[name]
    source, out = scratch / "scaling-base", scratch / "scaling-split"
    for directory in (source, out):
        shutil.rmtree(directory, ignore_errors=True)
    write_model(source, shape)
    start_peak()
    start = time.process_time()
    init_checkpoint(source, out, PissaConfig(RANK))
    seconds = time.process_time() - start
    peak = peak_gib()
    size = sum(path.stat().st_size for path in source.iterdir())
    for directory in (source, out):
        shutil.rmtree(directory)
    described = {"shape": list(shape), "bytes": size, "seconds": seconds, "threads": 1}
    return {**described, "peak_gib": peak, "where": "here, CPU seconds"}


def write_model(directory: Path, shape: Shape) -> None:
    """A checkpoint of these shapes in bf16."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(0)
    names = [*(f"self_attn.{name}_proj" for name in "qokv"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    tensors = {
        f"model.layers.{i // len(names)}.{names[i % len(names)]}.weight": weight_like(m, n, generator).bfloat16()
        for i, (m, n) in enumerate(shape.matrices)
    }
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(shape.vocabulary, shape.hidden, generator=generator).mul_(0.02).bfloat16()
    heads = 4 if shape is TINY else shape.hidden // 64
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads * shape.small // shape.hidden,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    with output_directory(directory) as partial:
        config.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})


def matmul_rate(side: int) -> float:
    """Floating-point operations a CPU second of a square matrix product in fp32, the best of three."""
    X = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        torch.mm(X, X)
        best = min(best, time.process_time() - start)
    return 2 * side**3 / max(best, 1e-6)
