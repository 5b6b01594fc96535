"""What does the fast SVD cost in accuracy, and does that matter for training?

The authors' fast SVD is torch's `svd_lowrank` with `niter` subspace iterations, as PEFT's `pissa_niter_N` has it. It is
compared with the exact SVD and with this library's (`ours`): CPU seconds of one thread over real matrices, the error of
the principal part, `mean |B·A − B*·A*| / mean |B*·A*|` over the self-attention (exact factors with a star), and the
loss after some training steps from each, PEFT's own initialisation for the rivals, the same batches for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pissa.adapted.adapt import adapt
from pissa.checkpoint.source.load import load_base
from pissa.colours import LIGHT
from pissa.config import PissaConfig
from pissa.decompose.svd import truncated_svd
from pissa.lab.demo.arithmetic import make_problems
from pissa.training.run import quieten

from .figures import new_figure
from .fit import fit
from .interval import Interval, mean_interval, paired_difference
from .judge import by_seed, verdict_of
from .language import batches_in_memory, language_model, response_mean
from .study import Outcome, Settings, Study, model_name
from .threads import one_thread
from .weights import loaded, spread

NAME = "fast-svd"
EXACT, OURS = "exact", "ours"
NITERS = ("1", "2", "4", "8", "16")
TEN_TIMES = 10
LEARNING_RATE = 2e-4
LAST_STEPS = 4
"""Steps whose mean training loss counts as the final one."""


def run(settings: Settings) -> Outcome:
    """Decompose some matrices, and train from every kind of factors."""
    model = language_model(settings)
    name = model_name(model)
    ranks = settings.pick(quick=[4], default=[1, 8, 32, 128], full=[1, 2, 4, 8, 16, 32, 64, 128])
    blocks = settings.pick(quick=1, default=2, full=None)
    keys = [
        {"source": name, "rank": rank, "blocks": blocks, "seed": seed, "method": method}
        for rank in ranks
        for seed in settings.seeds
        for method in (*NITERS, EXACT, OURS)
    ]
    rows = settings.grid(f"{NAME}-matrices", keys, lambda source, **key: decomposed(model, **key))
    trained = settings.pick(quick=[4], default=[32], full=ranks)
    plan = settings.pick(
        quick={"steps": 6, "batch": 2}, default={"steps": 8, "batch": 2}, full={"steps": 200, "batch": 8}
    )
    runs = [
        {"base": name, "rank": rank, "seed": seed, "method": method, **plan}
        for rank in trained
        for seed in settings.seeds
        for method in settings.pick(
            quick=("1", EXACT, OURS), default=("1", "16", EXACT, OURS), full=(*NITERS, EXACT, OURS)
        )
    ]
    losses = settings.grid(NAME, runs, lambda base, **key: trained_loss(model, **key))
    parts = parts_of(rows, losses, max(trained))
    results = {"matrices": rows, "training": losses, "parts": {name: part.as_dict() for name, part in parts.items()}}
    return Outcome(results, verdict_of(parts), figures_of(results, parts, max(trained)))


def decomposed(source: str, rank: int, blocks: int | None, seed: int, method: str) -> dict[str, Any]:
    """CPU seconds of all matrices, and the mean error of the self-attention's principal parts."""
    seconds, errors, count = 0.0, [], 0
    for name in spread(source, blocks):
        W, _ = loaded(source)[name]
        if rank > min(W.shape):
            continue
        with one_thread():
            start = time.thread_time()
            found = principal(W, rank, method, seed)
            seconds += time.thread_time() - start
        count += 1
        if "attn" in name or "attention" in name:
            U, S, Vh = exact_svd(source, name)
            exact = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            errors.append(float((found - exact).abs().mean() / exact.abs().mean()))
    return {"seconds": seconds, "matrices": count, "error": statistics.fmean(errors)}


@lru_cache(maxsize=256)
def exact_svd(source: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The exact SVD of one matrix, kept to compare with."""
    return torch.linalg.svd(loaded(source)[name][0], full_matrices=False)


def principal(W: Tensor, rank: int, method: str, seed: int) -> Tensor:
    """B·A (out, in) of one method."""
    if method == EXACT:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    elif method == OURS:
        U, S, Vh, _ = truncated_svd(W, rank, seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, rank, niter=int(method))
        Vh = V.mT
    return (U * S) @ Vh


def trained_loss(base: str, rank: int, seed: int, method: str, steps: int, batch: int) -> dict[str, Any]:
    """Fine-tune from one kind of factors; the mean loss of the last steps."""
    quieten()
    model = load_base(base, dtype=torch.float32)
    with one_thread():
        start = time.thread_time()
        if method == OURS:
            model = adapt(model, PissaConfig(rank, seed=seed))
        else:
            kind = "pissa" if method == EXACT else f"pissa_niter_{method}"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=kind, target_modules="all-linear")  # pyright: ignore[reportArgumentType]
                model = get_peft_model(model, config)
        seconds = time.thread_time() - start
    rows, _ = make_problems(seed, steps * batch, 0)
    batches = batches_in_memory(base, rows, batch, steps)
    found = fit(model.train(), batches, response_mean, learning_rate=LEARNING_RATE, steps=steps)
    return {"init_seconds": seconds, "losses": found.losses, "final_loss": statistics.fmean(found.losses[-LAST_STEPS:])}


def parts_of(rows: Sequence[Mapping[str, Any]], losses: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Interval]:
    """What the claim says, each part as a difference that should be positive."""
    times = {method: by_seed(rows, "seconds", method=method, rank=rank) for method in ("4", EXACT)}
    ratios = [exact / fast for exact, fast in zip(times[EXACT], times["4"], strict=True)]
    most = max(NITERS, key=int)
    final = {m: by_seed(losses, "final_loss", method=m, rank=rank) for m in sorted({row["method"] for row in losses})}
    gaps = {m: [abs(a - b) for a, b in zip(v, final[EXACT], strict=True)] for m, v in final.items()}
    nearest = most if most in gaps else OURS
    return {
        f"exact SVD's time over niter 4's, less {TEN_TIMES}": mean_interval([ratio - TEN_TIMES for ratio in ratios]),
        f"error at niter 1 less that at {most}": paired_difference(
            by_seed(rows, "error", method="1", rank=rank), by_seed(rows, "error", method=most, rank=rank)
        ),
        f"distance of the final loss from exact SVD's at niter 1 less that at {nearest}": paired_difference(
            gaps["1"], gaps[nearest]
        ),
    }


def figures_of(results: Mapping[str, Any], parts: Mapping[str, Interval], rank: int) -> str:
    """Time, error and loss of each method at the trained rank, then the parts."""
    lines = []
    for method in (*NITERS, EXACT, OURS):
        seconds, error = (
            statistics.fmean(by_seed(results["matrices"], name, method=method, rank=rank))
            for name in ("seconds", "error")
        )
        losses = by_seed(results["training"], "final_loss", method=method, rank=rank)
        loss = f", loss {statistics.fmean(losses):.4f}" if losses else ""
        lines.append(
            f"{method if not method.isdigit() else 'niter ' + method} {seconds:.2f} s, error {error:.1e}{loss}"
        )
    return f"rank {rank}, loss after {results['training'][0]['steps']} steps: {'; '.join(lines)}"


def draw(results: Mapping[str, Any]) -> Any:
    """Time and error against rank, and the distance of the final loss from the exact SVD's."""
    figure, (times, errors, losses) = new_figure(1, 3)
    ranks = sorted({row["rank"] for row in results["matrices"]})
    palette = {**{niter: LIGHT[1] for niter in NITERS}, EXACT: LIGHT[5], OURS: LIGHT[0]}
    for number, method in enumerate((*NITERS, EXACT, OURS)):
        strength = 0.35 + 0.16 * number if method in NITERS else 1.0
        style = {"color": palette[method], "alpha": min(1.0, strength), "marker": "."}
        label = f"niter {method}" if method in NITERS else method
        for panel, value in ((times, "seconds"), (errors, "error")):
            if value == "seconds" or method != EXACT:
                rows = [statistics.fmean(by_seed(results["matrices"], value, method=method, rank=r)) for r in ranks]
                panel.plot(ranks, rows, label=label, **style)
    methods = list(dict.fromkeys(row["method"] for row in results["training"]))
    rank = max(row["rank"] for row in results["training"])
    exact = by_seed(results["training"], "final_loss", method=EXACT, rank=rank)
    for place, method in enumerate(m for m in methods if m != EXACT):
        found = by_seed(results["training"], "final_loss", method=method, rank=rank)
        gaps = [a - b for a, b in zip(found, exact, strict=True)]
        losses.scatter([place] * len(gaps), gaps, color=palette[method], s=24)
    labels = [f"niter {m}" if m in NITERS else m for m in methods if m != EXACT]
    losses.set_xticks(range(len(labels)), labels)
    losses.axhline(0, color="#888888", linewidth=0.8)
    losses.set(title=f"rank {rank}, one point a seed", ylabel="final training loss − exact SVD's")
    times.set(title="time", xlabel="rank", ylabel="CPU seconds", xscale="log", yscale="log")
    errors.set(
        title="error of self-attention", xlabel="rank", ylabel="mean |ΔBA| / mean |BA|", xscale="log", yscale="log"
    )
    times.legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    NAME,
    "Fast SVD takes a small part of the exact SVD's time, its error falls with the iterations, and the final training "
    "loss comes to the exact SVD's (PiSSA, appendix B, table 6)",
    run,
    draw,
    minutes=7,
)
