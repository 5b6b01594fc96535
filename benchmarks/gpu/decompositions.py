"""Stage: every linear of LLaMA-2-7B's shapes is decomposed; seconds, the certified loss, and the true one.

Ours decomposes all matrices, in batches. The rivals, `torch.svd_lowrank` as PEFT calls it (one fp32 matrix at a time,
niter 4 and 16), are timed on the first few matrices of each shape, scaled to all of them. The true captured-energy loss
is that of the first matrix of each shape, against its exact fp64 singular values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.svd_sections.rivals import energy_loss, torch_lowrank
from pissa import truncated_svd
from pissa.decompose.certificate import Certificate
from pissa.decompose.svd import decompose

from .context import Context
from .measure import median_seconds, product_rate, release
from .models import decaying
from .sizes import Sizes

AIM_SECONDS, AIM_LOSS = 2.0, 1e-3
Triplets = tuple[Tensor, Tensor, Tensor]


def default(W: Tensor, rank: int) -> Any:
    """The library's default."""
    return truncated_svd(W, rank, tolerance=AIM_LOSS)


def fp32(W: Tensor, rank: int) -> Any:
    """Krylov with all products in fp32."""
    return decompose(W, rank, AIM_LOSS, "krylov", 0, sketch=torch.float32)


def bf16(W: Tensor, rank: int) -> Any:
    """Krylov with its first products in bf16."""
    return decompose(W, rank, AIM_LOSS, "krylov", 0, sketch=torch.bfloat16)


OURS: dict[str, Callable[[Tensor, int], Any]] = {
    "pissa, default": default,
    "pissa, krylov in fp32": fp32,
    "pissa, krylov with bf16 products": bf16,
}
RIVALS = {"svd_lowrank niter 4": torch_lowrank(4), "svd_lowrank niter 16": torch_lowrank(16)}


def run(context: Context) -> None:
    """Record the device's rate and, for each method, seconds of all linears and losses, shape after shape."""
    sizes = context.sizes
    context.record(
        linears=sum(count for _, _, count in sizes.matrices),
        rank=sizes.rank,
        aim={"seconds": AIM_SECONDS, "loss": AIM_LOSS},
        bf16_flops=product_rate(context.device, sizes.product),
    )
    methods: dict[str, dict[str, Any]] = {name: {"seconds": 0.0, "shapes": {}} for name in (*OURS, *RIVALS)}
    for m, n, count in sizes.matrices:
        weights = made(m, n, count, context)
        first = weights[0][0].float()
        exact = torch.linalg.eigvalsh(gram(first)).flip(-1).clamp_min(0).sqrt()
        for name in methods:
            context.attempt("newest", one_shape, name, weights, first, exact, sizes, context.device)
            note(methods[name], f"{m}×{n}", context.figures.pop("newest"))
            context.record(methods=methods)
        del weights, first
        release()


def made(m: int, n: int, count: int, context: Context) -> list[Tensor]:
    """The matrices of one shape, bf16, in batches."""
    batches = []
    for start in range(0, count, context.sizes.batch):
        generator = torch.Generator(context.device).manual_seed(start)
        size = min(context.sizes.batch, count - start)
        batches.append(torch.stack([decaying((m, n), generator) for _ in range(size)]))
    return batches


def gram(W: Tensor) -> Tensor:
    """The smaller Gram matrix in fp64."""
    wide = W.double() if W.shape[0] >= W.shape[1] else W.double().mT
    return wide.mT @ wide


def one_shape(
    name: str, weights: list[Tensor], first: Tensor, exact: Tensor, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """Seconds of all matrices of a shape by one method, how many were timed, and the losses."""
    count = sum(len(batch) for batch in weights)
    if name in RIVALS:
        some = [W for batch in weights for W in batch][: sizes.rival_matrices]
        spent, found = median_seconds(
            device, lambda: [RIVALS[name](W.float(), sizes.rank, 0) for W in some], 1, most=1.0
        )
        loss = energy_loss(first, exact, found[0])
        return {"seconds": spent * count / len(some), "timed": len(some), "of": count, "true_loss": loss}
    decomposed = OURS[name]
    spent, found = median_seconds(device, lambda: [decomposed(W, sizes.rank) for W in weights], sizes.repeats, most=4.0)
    each = [certificate for batch in found for certificate in listed(batch.certificate)]
    triplets = (found[0].U[0], found[0].S[0], found[0].Vh[0])
    return {
        "seconds": spent,
        "timed": count,
        "of": count,
        "certified_loss": max(certificate.captured_energy_loss for certificate in each),
        "bound": sorted({certificate.bound for certificate in each}),
        "passes": max(certificate.passes for certificate in each),
        "true_loss": energy_loss(first, exact, triplets),
    }


def listed(certificates: Certificate | tuple[Certificate, ...]) -> tuple[Certificate, ...]:
    """The certificates of a batch, also of one matrix alone."""
    return (certificates,) if isinstance(certificates, Certificate) else certificates


def note(method: dict[str, Any], shape: str, found: dict[str, Any]) -> None:
    """Add one shape's figures to a method's; without them it has no total."""
    method["shapes"][shape] = found
    if "seconds" not in found or method["seconds"] is None:
        method["seconds"] = None
        return
    method["seconds"] += found["seconds"]
    for loss in ("certified_loss", "true_loss"):
        if loss in found:
            method[f"largest_{loss}"] = max(method.get(f"largest_{loss}", 0.0), found[loss])
