"""Truncated SVD of weight matrices: pissa against every rival, turn by turn in one process.

    python benchmarks/svd.py [--quick] [--smollm DIR] [--minilm DIR] [--sections accuracy,matrices,model,rate]

Writes `svd.json` (versions, hardware, load, every time and loss) and `svd.png` (time against captured-energy loss,
log-log, a panel for each class of matrices) into benchmarks/results/. The oracle is LAPACK's singular values in fp64.

    accuracy   the default on every linear of both models, seeds 0 to 4: certified and true loss
    matrices   time and loss of pissa, torch, scikit-learn and scipy for each class
    model      all linears of SmolLM2 at r = 64, with the residual, against PEFT's initialisation
    rate       products with W: their share of the machine's own rate on the same shapes, and where the rest goes

Model directories hold `model.safetensors`; by default they are looked for in `.cache/`, and what is absent is skipped
with a message. Needs the `dev` and `report` extras, scikit-learn and scipy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pissa import PissaConfig, adapt, truncated_svd
from pissa.decompose.cost import block_width

ROOT = Path(__file__).resolve().parent.parent
SMOLLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Rival = Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


# --- matrices --------------------------------------------------------------------------------------------------------


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


# --- rivals ----------------------------------------------------------------------------------------------------------


def ours(**settings: Any) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        return truncated_svd(W, rank, seed=seed, **settings)[:3]

    return run


def torch_exact(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def torch_lowrank(niter: int) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
        return U, S, V.T

    return run


def sklearn_randomized(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(W.numpy(), rank, random_state=seed)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)


def scipy_svds(solver: str) -> Rival:
    def run(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        from scipy.sparse.linalg import svds

        U, S, Vh = (np.asarray(part) for part in svds(W.numpy(), rank, solver=solver, rng=seed))
        order = np.argsort(-S)
        return (
            torch.from_numpy(U[:, order].copy()),
            torch.from_numpy(S[order].copy()),
            torch.from_numpy(Vh[order].copy()),
        )

    return run


FAST: dict[str, Rival] = {
    "pissa 1e-3": ours(),
    "pissa 1e-2": ours(tolerance=1e-2),
    "pissa 2e-4": ours(tolerance=2e-4),
    "pissa 1e-6": ours(tolerance=1e-6),
    "svd_lowrank niter 1": torch_lowrank(1),
    "svd_lowrank niter 4": torch_lowrank(4),
    "svd_lowrank niter 16": torch_lowrank(16),
    "sklearn randomized_svd": sklearn_randomized,
}
SLOW: dict[str, Rival] = {
    "torch.linalg.svd": torch_exact,
    "scipy arpack": scipy_svds("arpack"),
    "scipy propack": scipy_svds("propack"),
}


def energy_loss(W: Tensor, values: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Captured-energy loss of factors with orthonormal U and V, 1 − Σ(2 s_i uᵢᵀW vᵢ − s_i²) / Σσᵢ²."""
    U, S, Vh = (x.double() for x in factors)
    inner = ((U.float().T @ W) * Vh.float()).double().sum(1)
    best = values[: len(S)].double().square().sum()
    return float(1 - (2 * S * inner - S.square()).sum() / best)


# --- sections --------------------------------------------------------------------------------------------------------


def measure_accuracy(models: dict[str, dict[str, Tensor]], rank: int, seeds: int) -> dict[str, Any]:
    """The default on every linear: the largest true and certified loss, and how far the two are apart."""
    losses, certified, optimism = [], [], []
    for weights in models.values():
        for W in weights.values():
            values = torch.linalg.svdvals(W.double())
            r = min(rank, min(W.shape))
            for seed in range(seeds):
                found = truncated_svd(W, r, seed=seed)
                losses.append(energy_loss(W, values, found[:3]))
                certified.append(found.certificate.captured_energy_loss)
                optimism.append(losses[-1] / certified[-1])
    count = len(losses)
    print(f"accuracy: {count} decompositions, largest loss {max(losses, default=0):.2e}")
    return {
        "decompositions": count,
        "largest_loss": max(losses, default=None),
        "largest_certified_loss": max(certified, default=None),
        "largest_ratio_true_to_certified": max(optimism, default=None),
    }


def measure_matrices(
    classes: dict[str, list[tuple[Tensor, Tensor]]],
    rank_of: Callable[[str], int],
    repeats: int,
    slow_repeats: int,
    only: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Alternating repetitions of every rival over all matrices of a class: median seconds, mean and largest loss."""
    rows = []
    for label, matrices in classes.items():
        rank = rank_of(label)
        rivals = {**FAST, **SLOW} if slow_repeats else FAST
        rivals = {name: rival for name, rival in rivals.items() if re.search(only, name)}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        losses: dict[str, list[float]] = {name: [] for name in rivals}
        for repeat in range(repeats):
            for name, rival in rotated(rivals, repeat):
                if name in SLOW and repeat >= slow_repeats:
                    continue
                settle()
                if name not in SLOW:
                    rival(matrices[0][0], rank, repeat)
                elapsed = 0.0
                for W, values in matrices:
                    start = clock()
                    found = rival(W, rank, repeat)
                    elapsed += clock() - start
                    losses[name].append(energy_loss(W, values, found))
                times[name].append(elapsed)
        for name in rivals:
            row = {
                "class": label,
                "rank": rank,
                "matrices": len(matrices),
                "rival": name,
                "median_seconds": statistics.median(times[name]),
                "load": os.getloadavg()[0],
                "seconds": times[name],
                "mean_loss": statistics.mean(losses[name]),
                "largest_loss": max(losses[name]),
            }
            rows.append(row)
            print(
                f"{label}: {name:24} {row['median_seconds']:8.3f} s  loss {row['largest_loss']:.1e}",
                flush=True,
            )
    return rows


def rotated(rivals: dict[str, Any], by: int) -> list[tuple[str, Any]]:
    """The rivals in an order that begins with another one each time, so that none always follows the same."""
    names = [*rivals]
    at = by % len(names)
    return [(name, rivals[name]) for name in names[at:] + names[:at]]


def settle() -> None:
    """Let the thread pool of the rival before go to sleep: for a while its threads spin, and take a core each."""
    time.sleep(0.3)


def measure_model(directory: Path, rank: int, repeats: int, exact_repeats: int) -> dict[str, Any]:
    """All linears of SmolLM2: whole initialisations, `adapt` against PEFT's `get_peft_model`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def fresh() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def with_peft(init: str) -> float:
        model = fresh()
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(SMOLLM_LINEARS),
            init_lora_weights=init,  # pyright: ignore
        )
        start = time.perf_counter()
        get_peft_model(model, config)
        return time.perf_counter() - start

    def with_pissa() -> float:
        model = fresh()
        start = time.perf_counter()
        adapt(model, PissaConfig(rank=rank, target_modules=list(SMOLLM_LINEARS)))
        return time.perf_counter() - start

    runs: dict[str, Callable[[], float]] = {
        "pissa.adapt": with_pissa,
        "PEFT, no decomposition": lambda: with_peft(True),  # pyright: ignore
        "PEFT pissa_niter_4": lambda: with_peft("pissa_niter_4"),
        "PEFT pissa_niter_16": lambda: with_peft("pissa_niter_16"),
        "PEFT pissa": lambda: with_peft("pissa"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in rotated(runs, repeat):
            settle()
            if name != "PEFT pissa" or repeat < exact_repeats:
                times[name].append(run())
                print(f"model: {name:24} {times[name][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["pissa.adapt"]
    return {
        "rank": rank,
        "median_seconds": medians,
        "seconds": times,
        "ratio": {k: v / base for k, v in medians.items()},
    }


def measure_rate(label: str, W: Tensor, rank: int, repeats: int) -> dict[str, Any]:
    """Share of the machine's rate for `W·X` and `Wᵀ·Y` (same shapes, same run) that a whole decomposition reaches."""
    from torch.profiler import ProfilerActivity, profile

    W = W if W.shape[0] >= W.shape[1] else W.T
    m, n = W.shape
    b = block_width(rank)
    X, Y = torch.randn(n, b), torch.randn(m, b)
    product_times, totals, passes = [], [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(W, X)
        torch.mm(W.T, Y)
        product_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        passes = truncated_svd(W, rank, algorithm="krylov").certificate.passes
        totals.append(time.perf_counter() - start)
    machine = 4 * m * n * b / statistics.median(product_times)
    reached = 2 * m * n * b * passes / statistics.median(totals)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        truncated_svd(W, rank, algorithm="krylov")
    spent = {
        "products with W": 0.0,
        "orthogonalisation": 0.0,
        "small eigenproblems": 0.0,
        "copies": 0.0,
        "other": 0.0,
    }
    for event in recorded.key_averages(group_by_input_shape=True):
        spent[kind_of(event.key, event.input_shapes, (m, n))] += event.self_cpu_time_total
    whole = sum(spent.values())
    share = {name: value / whole for name, value in spent.items()}
    print(
        f"rate {label}: {reached / 1e9:.0f} of {machine / 1e9:.0f} GFLOP/s = {reached / machine:.0%};",
        end=" ",
    )
    print(", ".join(f"{name} {value:.0%}" for name, value in share.items()), flush=True)
    return {
        "matrix": label,
        "block": b,
        "passes": passes,
        "machine_gflops": machine / 1e9,
        "reached_gflops": reached / 1e9,
        "share_of_machine_rate": reached / machine,
        "where_the_time_goes": share,
    }


def kind_of(operation: str, shapes: list[Any], weight: tuple[int, int]) -> str:
    """Which part of the method an operator of the profile belongs to."""
    if operation == "aten::mm" and shapes and tuple(shapes[0]) in (weight, weight[::-1]):
        return "products with W"
    if "eigh" in operation or "qr" in operation:
        return "small eigenproblems"
    if operation in (
        "aten::mm",
        "aten::addmm_",
        "aten::linalg_cholesky_ex",
        "aten::linalg_solve_triangular",
        "aten::triu",
    ):
        return "orthogonalisation"
    if operation in ("aten::copy_", "aten::fill_"):
        return "copies"
    return "other"


# --- report ----------------------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(row["class"] for row in rows))
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    names = list(dict.fromkeys(row["rival"] for row in rows))
    for axis, label in zip(axes.flat, labels, strict=False):
        for row in (row for row in rows if row["class"] == label):
            marker = "*" if row["rival"].startswith("pissa") else "o"
            color = plt.get_cmap("tab20")(2 * names.index(row["rival"]) % 19)
            loss = max(row["mean_loss"], 1e-8)
            axis.loglog(loss, row["median_seconds"], marker, color=color, ms=11 if marker == "*" else 6)
        axis.set_title(f"{label}, r {row_rank(rows, label)}", fontsize=8)
        axis.set_xlabel("captured-energy loss")
        axis.set_ylabel("seconds")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(labels) :]:
        axis.axis("off")
    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker="*" if name.startswith("pissa") else "o",
            color=plt.get_cmap("tab20")(2 * i % 19),
            label=name,
        )
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)


def row_rank(rows: list[dict[str, Any]], label: str) -> int:
    return next(row["rank"] for row in rows if row["class"] == label)


def environment(threads: int) -> dict[str, Any]:
    import peft
    import scipy
    import sklearn

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "peft": peft.__version__,
        "cpu": model,
        "threads": threads,
        "load_at_start": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of pissa's truncated SVD against its rivals.")
    parser.add_argument("--quick", action="store_true", help="small matrices, two repetitions: a check that it runs")
    parser.add_argument("--smollm", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--minilm", type=Path, default=ROOT / ".cache" / "all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--sections", default="accuracy,matrices,model,rate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=5, help="repetitions of the exact and the scipy solvers")
    parser.add_argument("--every", type=int, default=1, help="time every N-th layer of the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64, help="rank for the models' linears; 128 for the large matrices")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="of the section `matrices`; cpu is one thread's time, for a machine that other jobs share (--threads 1)",
    )
    parser.add_argument("--classes", default="", help="regular expression: only these classes of matrices")
    parser.add_argument("--rivals", default="", help="regular expression: only these rivals")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.slow_repeats, args.every = 2, 1, 10
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")

    sections = args.sections.split(",")
    smollm, minilm = linears(args.smollm, "SmolLM2-135M"), linears(args.minilm, "all-MiniLM-L6-v2")
    large = large_matrices(smollm, 8 if args.quick else 1) if {"matrices", "rate"} & set(sections) else {}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "svd.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    report["environment"] = environment(args.threads)
    report["settings"] = {
        "repeats": args.repeats,
        "slow_repeats": args.slow_repeats,
        "every": args.every,
        "clock": args.clock,
    }
    if "accuracy" in sections:
        models = {"smollm": smollm, "minilm": minilm}
        if args.every > 1:
            models = {k: dict(list(v.items())[:: args.every]) for k, v in models.items()}
        report["accuracy"] = measure_accuracy(models, 64, 2 if args.quick else 5)
        save(report, path)
    if "matrices" in sections:
        classes = classes_of(smollm, minilm, args.every, args.classes)
        classes |= {name: [pair] for name, pair in large.items() if re.search(args.classes, name)}
        rank = dict.fromkeys(large, 16 if args.quick else 128)
        clock = time.thread_time if args.clock == "cpu" else time.perf_counter
        rows = measure_matrices(
            classes, lambda label: rank.get(label, int(args.rank)), args.repeats, args.slow_repeats, args.rivals, clock
        )
        measured = {(row["class"], row["rival"]) for row in rows}
        kept = [row for row in report.get("matrices", []) if (row["class"], row["rival"]) not in measured]
        report["matrices"] = kept + rows
        draw(report["matrices"], args.out / "svd.png")
        save(report, path)
    if "rate" in sections:
        report["rate"] = [measure_rate(k, W, 16 if args.quick else 128, args.repeats) for k, (W, _) in large.items()]
    if "model" in sections and smollm:
        report["model"] = measure_model(args.smollm, 64, args.repeats, args.slow_repeats)
    report["environment"]["load_at_end"] = os.getloadavg()
    save(report, path)


def save(report: dict[str, Any], path: Path) -> None:
    """After every section, so that a run that is interrupted keeps what it has measured."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


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


if __name__ == "__main__":
    main()
