"""A local checkpoint with LLaMA-3-8B's shapes, whole or with fewer layers, for benchmarks and tests of size.

    python benchmarks/make_checkpoint.py DIRECTORY --size 16G

Sizes: 1G (2 layers, a small vocabulary), 4G, 8G and 16G (LLaMA-3-8B itself, 32 layers), all in bf16 and with the same
largest matrix, 14336 x 4096, among those that are split. The weights are noise with a low-rank part whose singular
values fall slowly, as in pretrained weights. The noise is drawn once and cut from at random places, so that 16 GB take
a minute or two; a few hundred megabytes of memory are enough.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.checkpoint.disk.layout import INDEX, TensorKind, raw_bytes, sharded

NOISE = 1 << 26
"""Values of noise that all weights are cut from."""
LOW_RANK = 48


class Shape(NamedTuple):
    """A LLaMA's shapes."""

    layers: int
    vocabulary: int
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8


SIZES = {
    "tiny": Shape(2, 256, 128, 256, 4, 2),
    "1G": Shape(2, 16384),
    "4G": Shape(5, 128256),
    "8G": Shape(14, 128256),
    "16G": Shape(32, 128256),
}


def main() -> None:
    """Read the arguments, make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="16G")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.directory, SIZES[arguments.size], arguments.seed)


def make(directory: Path, shape: Shape, seed: int) -> None:
    """Write shards, index and configuration."""
    directory.mkdir(parents=True, exist_ok=False)
    tensors = {name: TensorKind("BF16", size) for name, size in names(shape).items()}
    files, index = sharded(tensors)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NOISE, generator=generator).mul_(0.02).to(torch.bfloat16)
    for file in files:
        file.allocate(directory)
        with (directory / file.name).open("r+b") as stream:
            for name, offset in sorted(file.offsets.items(), key=lambda item: item[1]):
                stream.seek(offset)
                for block in blocks(tensors[name].shape, noise, generator):
                    stream.write(raw_bytes(block))
            os.fsync(stream.fileno())
    if index is not None:
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(configuration(shape), indent=2), encoding="utf-8")


def names(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, in the model's order."""
    hidden, small = shape.hidden, shape.hidden // shape.heads * shape.key_value_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (small, hidden),
        "self_attn.v_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for number in range(shape.layers):
        found |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (shape.vocabulary, hidden)}


def blocks(size: tuple[int, ...], noise: Tensor, generator: torch.Generator):
    """A tensor's values row block by row block: ones for a norm, else noise and a low-rank part."""
    if len(size) == 1:
        yield torch.ones(size, dtype=torch.bfloat16)
        return
    rows, columns = size
    strengths = 0.02 * (rows**0.5 + columns**0.5) * torch.arange(1, LOW_RANK + 1).pow(-0.5)
    right = torch.randn(LOW_RANK, columns, generator=generator) / columns**0.5
    step = max(1, min(rows, (1 << 22) // columns))
    for top in range(0, rows, step):
        count = min(step, rows - top)
        left = torch.randn(count, LOW_RANK, generator=generator) / rows**0.5 * strengths
        start = int(torch.randint(0, NOISE - count * columns, (), generator=generator))
        part = noise[start : start + count * columns].view(count, columns)
        yield torch.addmm(part.float(), left, right).to(torch.bfloat16)


def configuration(shape: Shape) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    }


if __name__ == "__main__":
    main()
