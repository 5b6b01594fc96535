"""How long does initialisation take, and how much memory, from 100M to 70B parameters?

    seconds = c₀ + c₁ · Σ t(m, n, r) / threads + c₂ · bytes          t = a · (m·n)^p, fitted for each rank

t is measured here on single matrices up to the shapes of a 70B model; the c's are fitted, as relative errors and none
negative, to whole initialisations: those below, measured on two idle cores (benchmarks/results/init.json), and small
ones measured here (CPU seconds, as if of one thread). Beyond what was measured the model is extrapolated, with an
interval from its residuals. The claim is of a GPU; here it is a processor, so both readings of it are tested: seconds
at 7B, and a negligible share of the paper's own training run (100k examples of 200 tokens) on the same machine.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint.stream import init_checkpoint
from ...checkpoint.write import output_directory
from ...config import PissaConfig
from ...decompose.svd import truncated_svd
from ...errors import MissingExtraError
from ..figures import COLOURS, new_figure
from ..interval import Interval
from ..memory import peak_gib, start_peak
from ..student_t import quantile
from .judge import sentence, verdict_of
from .language import RUNS
from .study import Outcome, Settings, Study

NAME = "scaling"
RANK = 16
"""Of the whole initialisations."""
PAPER_RANK = 128
PAPER_SECONDS = 22.7
"""The paper's slowest fast SVD of LLaMA-2-7B at rank 128 (table 6)."""
TRAINING_TOKENS = 100_000 * 200
NEGLIGIBLE = 0.01
LOW_RANK = 48


class Shape(NamedTuple):
    """A Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    small: int
    """Rows of the key and value projections."""
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of all that is split."""
        h, i, k = self.hidden, self.intermediate, self.small
        return self.layers * [(h, h), (h, h), (k, h), (k, h), (i, h), (i, h), (h, i)]

    @property
    def parameters(self) -> int:
        """All weights, with input and output embedding."""
        return sum(m * n for m, n in self.matrices) + 2 * self.vocabulary * self.hidden


MEASURED = (
    ("LLaMA-3-8B, 2 layers", Shape(2, 4096, 14336, 1024, 16384), 1140894408, 19.99, 1536237568),
    ("LLaMA-3-8B, 5 layers", Shape(5, 4096, 14336, 1024, 128256), 4282480409, 42.99, 2337574912),
    ("LLaMA-3-8B, 14 layers", Shape(14, 4096, 14336, 1024, 128256), 8208516432, 91.54, 2404548608),
    ("LLaMA-3-8B", Shape(32, 4096, 14336, 1024, 128256), 16060580703, 188.77, 1576562688),
)
"""Name, shape, bytes on disk, seconds, peak bytes; two threads, bf16, rank 16 (benchmarks/results/init.json)."""
MEASURED_THREADS = 2
PREDICTED = {
    "100M": Shape(12, 768, 2048, 768, 32000),
    "1B": Shape(22, 2048, 5632, 256, 32000),
    "7B": Shape(32, 4096, 11008, 4096, 32000),
    "13B": Shape(40, 5120, 13824, 5120, 32000),
    "34B": Shape(48, 8192, 22016, 1024, 32000),
    "70B": Shape(80, 8192, 28672, 1024, 32000),
}
SMALL = {
    "100M": PREDICTED["100M"],
    "1B, 6 layers": PREDICTED["1B"]._replace(layers=6),
    "13B, 1 layer": PREDICTED["13B"]._replace(layers=1, vocabulary=1024),
    "70B, 1 layer": PREDICTED["70B"]._replace(layers=1, vocabulary=1024),
}
TINY = Shape(2, 128, 256, 64, 256)
SQUARES = [(side, side) for side in (512, 1024, 2048, 4096)]


def run(settings: Settings) -> Outcome:
    """Measure matrices and small models, fit, extrapolate."""
    shapes = settings.pick(
        quick=[(128, 128), (256, 128), (256, 256)],
        default=[*SQUARES, (11008, 4096), (8192, 8192)],
        full=[*SQUARES, (11008, 4096), (8192, 8192), (28672, 8192)],
    )
    ranks = settings.pick(quick=[RANK, 64], default=[RANK, PAPER_RANK], full=[RANK, PAPER_RANK])
    keys = [
        {"m": m, "n": n, "rank": rank, "seed": seed} for m, n in shapes for rank in ranks for seed in settings.seeds
    ]
    matrices = settings.grid(f"{NAME}-matrices", keys, svd_seconds)
    names = settings.pick(quick=["tiny"], default=list(SMALL)[:3], full=list(SMALL))
    scratch = settings.out / RUNS
    whole = settings.grid(NAME, [{"name": name} for name in names], lambda name: init_seconds(name, scratch))
    laws = {rank: power_law([row for row in matrices if row["rank"] == rank]) for rank in ranks}
    rows = [*whole, *published()]
    model = fitted(rows, laws[RANK])
    predictions = [predicted(name, rank, model, laws[rank]) for name in PREDICTED for rank in ranks]
    rate = matmul_rate(settings.pick(quick=256, default=2048, full=4096))
    memory = memory_law(rows)
    for each in predictions:
        each["peak_gib"] = memory["base"] + memory["slope"] * largest(PREDICTED[each["name"]])
        each["training_share"] = each["seconds"] / training_seconds(PREDICTED[each["name"]], rate)
    fits = {
        "laws": {str(rank): law for rank, law in laws.items()},
        "model": model,
        "memory": memory,
        "flops_per_thread": rate,
    }
    parts = parts_of(predictions, max(ranks))
    listed = {name: part.as_dict() for name, part in parts.items()}
    results = {"matrices": matrices, "inits": rows, **fits, "predictions": predictions, "parts": listed}
    return Outcome(results, verdict_of(parts), f"{sentence(parts)}. {figures_of(results, max(ranks))}")


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


def published() -> list[dict[str, Any]]:
    """The rows of MEASURED in the shape of those measured here."""
    return [
        {
            "name": name,
            "shape": list(shape),
            "bytes": size,
            "seconds": seconds,
            "threads": MEASURED_THREADS,
            "peak_gib": peak / 2**30,
            "where": "two idle cores, wall clock",
        }
        for name, shape, size, seconds, peak in MEASURED
    ]


def power_law(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """t = a · (m·n)^p by least squares of the logarithms, with the residuals of every row."""
    x = torch.tensor([math.log(row["m"] * row["n"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(row["seconds"]) for row in rows], dtype=torch.float64)
    p = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    log_a = float(y.mean() - p * x.mean())
    return {"a": math.exp(log_a), "p": p, "residuals": (y - log_a - p * x).exp().sub(1).tolist()}


def all_svds(shape: Shape, law: Mapping[str, Any]) -> float:
    """CPU seconds of all SVDs of a model."""
    return sum(law["a"] * (m * n) ** law["p"] for m, n in shape.matrices)


def terms(shape: Shape, size: float, threads: int, law: Mapping[str, Any]) -> list[float]:
    """What the coefficients multiply."""
    return [1.0, all_svds(shape, law) / threads, size / 1e9]


def fitted(rows: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> dict[str, Any]:
    """The three coefficients, the relative residual of every row, and the factor that a prediction may be off by."""
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise MissingExtraError("the fit needs scipy: pip install 'pissa[studies]'") from error
    A = torch.tensor([terms(Shape(*r["shape"]), r["bytes"], r["threads"], law) for r in rows], dtype=torch.float64)
    T = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    c, _ = nnls((A / T[:, None]).numpy(), torch.ones_like(T).numpy())
    ratios = (A @ torch.from_numpy(c)) / T
    freedom = max(1, len(rows) - int((c > 0).sum()))
    spread = math.sqrt(float(ratios.log().square().sum()) / freedom)
    factor = math.exp(min(50.0, quantile(0.05, freedom) * spread * math.sqrt(1 + 1 / len(rows))))
    return {"coefficients": c.tolist(), "residuals": (ratios - 1).tolist(), "factor": factor}


def predicted(name: str, rank: int, model: Mapping[str, Any], law: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of one model on two threads, in bf16."""
    shape = PREDICTED[name]
    parts = terms(shape, 2 * shape.parameters, MEASURED_THREADS, law)
    seconds = sum(c * part for c, part in zip(model["coefficients"], parts, strict=True))
    bounds = {"low": seconds / model["factor"], "high": seconds * model["factor"]}
    return {"name": name, "parameters": shape.parameters, "rank": rank, "seconds": seconds, **bounds}


def memory_law(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Peak GiB = base + slope · entries of the largest matrix, by least squares, with the residuals in GiB.

    A few of the largest matrices are in work at once, however many there are in all.
    """
    known = [row for row in rows if row["peak_gib"] is not None]
    x = torch.tensor([largest(Shape(*row["shape"])) for row in known], dtype=torch.float64)
    y = torch.tensor([row["peak_gib"] for row in known], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    base = float(y.mean() - slope * x.mean())
    return {"base": base, "slope": slope, "residuals": (base + slope * x - y).tolist()}


def largest(shape: Shape) -> int:
    """Entries of the largest matrix that is split."""
    return max(m * n for m, n in shape.matrices)


def matmul_rate(side: int) -> float:
    """Floating-point operations a CPU second of a square matrix product in fp32, the best of three."""
    X = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        torch.mm(X, X)
        best = min(best, time.process_time() - start)
    return 2 * side**3 / max(best, 1e-6)


def training_seconds(shape: Shape, rate: float) -> float:
    """The paper's run, forward and backward through frozen weights (4 operations a weight and token), at that rate."""
    return 4 * shape.parameters * TRAINING_TOKENS / (rate * MEASURED_THREADS)


def parts_of(predictions: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Interval]:
    """Seconds at 7B, as many as the paper's at most; and negligible beside training at every size."""
    found = [each for each in predictions if each["rank"] == rank]
    at_7b = next(each for each in found if each["name"] == "7B")
    most = max(found, key=lambda each: each["training_share"] * each["high"] / each["seconds"])
    return {
        f"seconds at 7B, the paper's {PAPER_SECONDS} less ours": below(PAPER_SECONDS, at_7b, at_7b["seconds"]),
        f"share of the training run, {NEGLIGIBLE} less ours": below(NEGLIGIBLE, most, most["training_share"]),
    }


def below(limit: float, prediction: Mapping[str, Any], value: float) -> Interval:
    """How far a multiple of a prediction's seconds lies below a limit."""
    low, mean, high = (limit - value * prediction[name] / prediction["seconds"] for name in ("high", "seconds", "low"))
    return Interval(mean, low, high, (mean,))


def figures_of(results: Mapping[str, Any], rank: int) -> str:
    """Predictions at the paper's rank, and how well the model fits."""
    found = [each for each in results["predictions"] if each["rank"] == rank]
    times = ", ".join(f"{e['name']} {e['seconds']:.0f} s ({e['low']:.0f} to {e['high']:.0f})" for e in found)
    share = max(each["training_share"] for each in found)
    off = max(abs(value) for value in results["model"]["residuals"])
    return (
        f"Rank {rank}, {MEASURED_THREADS} processor cores: {times}; at most {share:.1e} of the paper's training run "
        f"on the same cores; the model is off by up to {off:.0%} where it was measured, up to 8B; peak memory "
        f"{max(row['peak_gib'] or 0 for row in results['inits']):.1f} GiB at most there, {found[-1]['peak_gib']:.1f} "
        f"GiB at {found[-1]['name']} (off by up to {max(map(abs, results['memory']['residuals'])):.1f})"
    )


def draw(results: Mapping[str, Any]) -> Any:
    """Single SVDs with their power laws, whole initialisations with the extrapolation, and the residuals."""
    figure, (single, whole, left) = new_figure(1, 3)
    for number, (rank, law) in enumerate(results["laws"].items()):
        rows = [row for row in results["matrices"] if row["rank"] == int(rank)]
        sizes = sorted({row["m"] * row["n"] for row in rows})
        single.scatter([r["m"] * r["n"] for r in rows], [r["seconds"] for r in rows], s=14, color=COLOURS[number])
        text = f"rank {rank}: (m·n)^{law['p']:.2f}"
        single.plot(sizes, [law["a"] * size ** law["p"] for size in sizes], color=COLOURS[number], label=text)
        found = [each for each in results["predictions"] if each["rank"] == int(rank)]
        x = [each["parameters"] for each in found]
        whole.plot(x, [e["seconds"] for e in found], color=COLOURS[number], label=f"model, rank {rank}", marker=".")
        bounds = [e["low"] for e in found], [e["high"] for e in found]
        whole.fill_between(x, *bounds, color=COLOURS[number], alpha=0.15, lw=0)
    for where, marker in (("here, CPU seconds", "s"), ("two idle cores, wall clock", "o")):
        rows = [row for row in results["inits"] if row["where"] == where]
        sizes = [Shape(*row["shape"]).parameters for row in rows]
        label = f"measured ({where}), rank {RANK}"
        whole.scatter(
            sizes, [row["seconds"] for row in rows], marker=marker, color=COLOURS[5], s=28, label=label, zorder=3
        )
    names = [row["name"] for row in results["inits"]]
    left.barh(names, [100 * value for value in results["model"]["residuals"]], color=COLOURS[1])
    left.set(title="model against measurement", xlabel="residual, %")
    single.set(title="one truncated SVD", xlabel="m·n", ylabel="CPU seconds", xscale="log", yscale="log")
    whole.set(
        title="whole initialisation, two cores", xlabel="parameters", ylabel="seconds", xscale="log", yscale="log"
    )
    for panel in (single, whole):
        panel.legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    NAME,
    "PiSSA is initialised in seconds, a negligible cost, at every size from 184M to 70B (PiSSA, abstract and table 6)",
    run,
    draw,
    minutes=6,
)
