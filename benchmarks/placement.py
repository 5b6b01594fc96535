"""What a placement costs: a training step's time and memory, against plain LoRA of the same rank.

    python benchmarks/placement.py [MODEL_DIR] [--quick] [--ranks 16] [--tokens 1x128] [--dtype float32] [--out DIR]
    python benchmarks/placement.py --block 1024 --ranks 16,64 --tokens 4x256,8x512 --dtype bfloat16 --name block

Without MODEL_DIR, SmolLM2-135M; with --block, one Llama block of that width and a small vocabulary, so that many
tokens in 16 bits take minutes on a processor. One step each in turn, in an order that rotates: forward, backward,
AdamW, in CPU seconds of one thread. Memory is counted, not sampled: adapters, their gradients and AdamW's moments, and
what autograd keeps for the backward pass beyond the model's own weights. Writes `NAME.json`, by default
`placement.json`.

"offset, fused" is placement "offset" as cheap as it can be made: the frozen halves are no parameters, so that neither
gradient nor optimizer knows them, and one product each way takes both halves. Its adapter still costs 5 products of
r (in + out) values per token, where residual's costs 3: the two halves forward, the two halves back to the input, and
one half's gradients.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pissa import PissaConfig, adapt
from pissa.lab.models import smollm2
from pissa.live.state import adapter_layers
from pissa.provenance import hardware, package_versions

FUSED = "offset, fused"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora-kaiming"},
    "residual": {},
    "offset": {"placement": "offset"},
    FUSED: {"placement": "offset"},
}


class Product(torch.autograd.Function):
    """`s · x·[A ; A0]ᵀ·[B | −B0]ᵀ` with gradients of x, A and B alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, minus_B0: Tensor, scale: float) -> Tensor:
        both_A, both_B = torch.cat([A, A0]), torch.cat([B, minus_B0], dim=1)
        inner = x @ both_A.T
        ctx.save_for_backward(x, inner[..., : len(A)].contiguous(), both_A, both_B)
        ctx.scale, ctx.rank = scale, len(A)
        return (inner @ both_B.T) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, inner, both_A, both_B = ctx.saved_tensors
        gradient = (gradients[0] * ctx.scale).flatten(0, -2)
        back = gradient @ both_B
        of_A, of_B = back[:, : ctx.rank].T @ x.flatten(0, -2), gradient.T @ inner.flatten(0, -2)
        return (back @ both_A).view_as(x), of_A, of_B, None, None, None


class Fused(nn.Module):
    """One of PEFT's offset layers, with its frozen halves out of the parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        rank = len(A) // 2
        self.base_layer, self.scale = layer.get_base_layer(), layer.scaling["default"]
        self.A, self.B = nn.Parameter(A[:rank].clone()), nn.Parameter(B[:, :rank].clone())
        self.A0, self.minus_B0 = A[rank:].clone(), B[:, rank:].clone()

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        product: Any = Product.apply(x.to(self.A.dtype), self.A, self.B, self.A0, self.minus_B0, self.scale)
        return (result + product).to(result.dtype)


def fuse(model: Any) -> None:
    """Put fused layers in the place of a model's offset layers."""
    for name, layer in adapter_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_base_model().get_submodule(parent), child, Fused(layer))


def kept_for_backward(model: Any, batch: torch.Tensor) -> int:
    """Bytes of the tensors that a forward keeps for its backward pass, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch).loss
    del loss
    return sum(held.values())


def stepper(
    make: Callable[[], Any], rank: int, kind: str, batch: torch.Tensor
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that does one step and says how long it took; and what the placement takes of memory."""
    model: Any = adapt(make(), PissaConfig(rank, **KINDS[kind])).train()
    if kind == FUSED:
        fuse(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [p for name, p in model.named_parameters() if ".pissa_init." in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> float:
        start = time.thread_time()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.thread_time() - start

    size = sum(p.nbytes for p in trained)
    memory = {
        "adapter_gradients_moments_MB": (4 * size + sum(p.nbytes for p in frozen)) / 1e6,
        "kept_for_backward_MB": kept_for_backward(model, batch) / 1e6,
    }
    return step, memory


def measure(make: Callable[[], Any], rank: int, repetitions: int, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Median times and memory of every placement at one rank."""
    batch = torch.randint(0, make().config.vocab_size, tokens, generator=torch.Generator().manual_seed(0))
    steppers = {kind: stepper(make, rank, kind, batch) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    for repetition in range(repetitions + 1):
        for kind in order:
            seconds = steppers[kind][0]()
            if repetition:  # the first warms up
                times[kind].append(seconds)
        order = order[1:] + order[:1]
    medians = {kind: median(found) for kind, found in times.items()}
    return {
        kind: {
            "seconds": medians[kind],
            "time_ratio": medians[kind] / medians["lora"],
            "time_ratio_to_residual": median(a / b for a, b in zip(times[kind], times["residual"], strict=True)),
            **steppers[kind][1],
            "memory_ratio": sum(steppers[kind][1].values()) / sum(steppers["lora"][1].values()),
        }
        for kind in KINDS
    }


def block(width: int, dtype: torch.dtype) -> Any:
    """One Llama block with Llama 3's proportions, and a vocabulary that costs little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    return LlamaForCausalLM(config).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("model", nargs="?", type=Path, help="a language model's directory [SmolLM2-135M]")
    parser.add_argument("--block", type=int, help="one Llama block of this width instead")
    parser.add_argument("--quick", action="store_true", help="one rank, one repetition, few tokens; decides nothing")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--tokens", default="1x128", help="rows x length, several with commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="placement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    source = None if options.block else options.model or smollm2()

    def make() -> Any:
        if options.block:
            return block(options.block, dtype)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)

    shapes = ["1x16"] if options.quick else options.tokens.split(",")
    ranks = [4] if options.quick else [int(rank) for rank in options.ranks.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        tokens = tuple(int(size) for size in shape.split("x"))
        rows[shape] = {}
        for rank in ranks:
            rows[shape][str(rank)] = measure(make, rank, 1 if options.quick else options.repetitions, tokens)
            for kind, row in rows[shape][str(rank)].items():
                figures = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
                print(f"{shape} rank {rank} {kind}: {figures}", flush=True)
    document = {
        "settings": {
            "model": f"a Llama block of width {options.block}"
            if options.block
            else options.model.name
            if options.model
            else "SmolLM2-135M-Instruct",
            "dtype": options.dtype,
            "repetitions": options.repetitions,
            "clock": "CPU seconds of one thread, median",
        },
        "tokens": rows,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
