"""All 224 linears of a LLaMA-2-7B-shaped model at r = 128 on one GPU: seconds and certified loss.

    python benchmarks/svd_cuda.py [--device cuda] [--batch 8] [--tiny]

Needs torch and this package alone. Weights are random with a decay like that of real ones, in bf16 on the device,
made shape by shape before the clock starts. Target: at most 2 s on an H200 at a captured-energy loss of at most
1e-3. `--tiny` divides every side by 64 and the rank by 16, so that the same code runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from pissa.decompose.svd import decompose

LAYERS = 32
SHAPES = {(4096, 4096): 4 * LAYERS, (11008, 4096): 2 * LAYERS, (4096, 11008): LAYERS}
"""Shape -> how many linears have it: q, k, v, o; gate, up; down."""


def synthetic_batch(count: int, m: int, n: int, device: str, seed: int) -> Tensor:
    """(count, m, n) bf16: white noise plus a head that decays like 1/sqrt(i), cheap enough to make 7B of."""
    generator = torch.Generator(device).manual_seed(seed)
    k = max(1, min(m, n) // 8)
    noise = torch.randn(count, m, n, generator=generator, device=device, dtype=torch.bfloat16)
    left = torch.randn(count, m, k, generator=generator, device=device, dtype=torch.bfloat16)
    right = torch.randn(count, k, n, generator=generator, device=device, dtype=torch.bfloat16)
    decay = 8.0 * torch.arange(1, k + 1, device=device, dtype=torch.float32).rsqrt() * max(m, n) ** -0.5
    return noise.baddbmm_(left * decay.to(torch.bfloat16), right)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run(device: str, batch: int, shrink: int, rank: int, repeats: int, sketch: torch.dtype) -> dict[str, object]:
    """Median seconds over the whole model, by shape and in all; the largest certified loss."""
    seconds: dict[str, float] = {}
    worst = 0.0
    for (m, n), count in SHAPES.items():
        m, n = m // shrink, n // shrink
        weights = [synthetic_batch(min(batch, count - i), m, n, device, i) for i in range(0, count, batch)]
        times = []
        for _ in range(repeats + 1):
            synchronize(device)
            start = time.perf_counter()
            found = [decompose(W, rank, 1e-3, "krylov", 0, sketch=sketch) for W in weights]
            synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[f"{count} of {m}x{n}"] = statistics.median(times[1:])
        for result in found:
            worst = max(worst, *(c.captured_energy_loss for c in result.certificate))
        del weights
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "linears": sum(SHAPES.values()),
        "rank": rank,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "largest_certified_loss": worst,
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description="Decompose every linear of a LLaMA-2-7B-shaped model on a GPU.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sides / 64, rank 8, one repetition")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny checks the same code on a CPU")
    shrink, rank, repeats = (64, 8, 1) if args.tiny else (1, 128, args.repeats)
    report = run(args.device, args.batch, shrink, rank, repeats, torch.bfloat16)
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
