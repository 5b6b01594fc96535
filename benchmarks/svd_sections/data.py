"""Matrices to decompose: the linears of real models, and large ones whose decay is fitted to real spectra."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def linears(directory: Path | None, label: str) -> dict[str, Tensor]:
    """Every linear weight of a model on disk, fp32, by name; empty with a message when it is absent."""
    path = directory / "model.safetensors" if directory else None
    if path is None or not path.exists():
        print(f"{label}: no model.safetensors in {directory}, skipped")
        return {}
    from safetensors.torch import load_file

    tensors = load_file(path)
    wanted = {k: v.float() for k, v in tensors.items() if v.ndim == 2 and "embed" not in k and k.endswith("weight")}
    return {k: v for k, v in wanted.items() if "lm_head" not in k}


def classes_of(
    smollm: dict[str, Tensor], minilm: dict[str, Tensor], every: int, only: str
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Linears by shape: label -> (W, singular values in fp64)."""
    classes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for model, weights in (("SmolLM2", smollm), ("MiniLM", minilm)):
        kinds: dict[str, list[Tensor]] = {}
        for W in weights.values():
            kinds.setdefault(f"{model} {W.shape[0]}x{W.shape[1]}", []).append(W)
        for label, matrices in kinds.items():
            if not re.search(only, label):
                continue
            classes[label] = [(W, torch.linalg.svdvals(W.double())) for W in matrices[::every]]
    return classes


def fitted_decay(values: Tensor) -> tuple[float, float, float]:
    """(a, i0, p) of the power law `a·(i + i0)^−p` that is closest in log σ to the upper half of a real spectrum."""
    y = values[: len(values) // 2].double().log().numpy()
    i = np.arange(1, len(y) + 1)
    best = (np.inf, 0.0, 0.0, 0.0)
    for offset in np.linspace(0, 200, 401):
        x = np.log(i + offset)
        slope, intercept = np.polyfit(x, y, 1)
        error = float(((slope * x + intercept - y) ** 2).sum())
        best = min(best, (error, float(np.exp(intercept)), float(offset), float(-slope)))
    return best[1:]


def synthetic(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """(m, n) with the given singular values and Haar-random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator))[0]
    return (U * values.float()) @ V.T


def large_matrices(smollm: dict[str, Tensor], scale: int) -> dict[str, tuple[Tensor, Tensor]]:
    """4096² and 11008×4096 (divided by `scale`), name -> (W, singular values), decays fitted to real spectra.

    "power law" continues the fitted law to 4096 values; "stretched" spreads the real spectrum itself over 4096
    indices, which makes the head eight times wider and the problem much harder.
    """
    n, m = 4096 // scale, 11008 // scale
    i = torch.arange(1, n + 1, dtype=torch.float64)
    found = {}
    for label, name, rows in (
        ("q_proj", "model.layers.15.self_attn.q_proj.weight", n),
        ("gate_proj", "model.layers.15.mlp.gate_proj.weight", m),
    ):
        if name not in smollm:
            continue
        real = torch.linalg.svdvals(smollm[name].double())
        a, i0, p = fitted_decay(real)
        law = a * (i + i0) ** -p
        found[f"{rows}x{n} power law of {label} (i+{i0:.0f})^-{p:.2f}"] = (synthetic(rows, n, law), law)
        if label == "q_proj":
            at = np.linspace(0, len(real) - 1, n)
            stretched = torch.from_numpy(np.interp(at, np.arange(len(real)), real.numpy()))
            found[f"{rows}x{n} stretched {label}"] = (synthetic(rows, n, stretched), stretched)
    return found
