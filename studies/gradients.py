"""Where do the first steps go? Gradients at step 0 over seeds, and how far five steps go towards the last ones.

At step 0 LoRA's B is zero, so A gets no gradient, and B's gradient is the weight's seen through a random A; PiSSA's
factors come from the weight, so the seed changes nothing: that much is so by construction, here as in the paper.
Gradients of all layers together, one batch, one vector a seed: their coordinates in the plane that holds most of them
(table 11), and the cosine of each with the sum of the others.

For the way, with θ the factors A (or B) of all layers after k of K steps (figure 18):

    share(k) = ⟨θ_k − θ_0, θ_K − θ_0⟩ / ‖θ_K − θ_0‖²
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pissa.adapted.adapt import adapt
from pissa.config import PissaConfig

from .figures import band, look_of, new_figure
from .interval import Interval, mean_interval, paired_difference
from .judge import advantage, by_seed, verdict_of
from .lm import TUNED, InMemory, LanguageTask, find_rates, language_task
from .study import Outcome, Settings, Study

NAME = "gradients"
METHODS = ("lora", "pissa")
SIDES = ("A", "B")
RUNS = ("pissa", "lora", TUNED)
START_SEEDS = (0, 1, 2, 3, 4)
FIRST = 5
SAME = 0.99
"""Gradients whose cosine is above this point the same way."""


def run(settings: Settings) -> Outcome:
    """Gradients of every seed, then training runs with their first steps kept."""
    task = language_task(settings, steps=50)
    task = replace(task, steps=settings.pick(quick=8, default=50, full=50))
    rank = settings.pick(quick=4, default=8, full=128)
    memory = cache(lambda: InMemory(task))

    def measure(task: LanguageTask, /, method: str, rate: float, seed: int, rank: int, **_: Any) -> dict[str, Any]:
        return first_steps(memory().on(task), method, rate, seed, rank)

    about = {"task": task.name, "rank": rank}
    starts = settings.grid(
        f"{NAME}-start",
        [{"method": method, **about} for method in METHODS],
        lambda method, **_: first_gradients(memory(), method, rank),
    )
    search = find_rates(settings, NAME, task, METHODS, measure, rank=rank)
    rates = {"pissa": search.best["pissa"], "lora": search.best["pissa"], TUNED: search.best["lora"]}
    keys = [
        {"method": method, "rate": rates[method], "seed": seed, "steps": task.steps, **about}
        for method in RUNS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key))
    parts = parts_of(starts, rows)
    results = {
        "task": task.name,
        "search": search.as_dict(),
        "starts": starts,
        "runs": rows,
        "parts": {name: part.as_dict() for name, part in parts.items()},
    }
    return Outcome(results, verdict_of(parts), f"{task.name}, rank {rank}; {_cosines(starts)}; rates {search}")


def _cosines(starts: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for row in starts:
        for side in SIDES:
            cosines = row[side]["cosines"]
            text = f"cosines with other seeds' {min(cosines):.2f} to {max(cosines):.2f}" if cosines else "0"
            said.append(f"{row['method']}'s gradient of {side}: {text}")
    return ", ".join(said)


def adapted(memory: InMemory, method: str, seed: int, rank: int) -> Any:
    """The model with its adapter, in training mode."""
    kind = "pissa" if method == "pissa" else "lora-kaiming"
    return adapt(memory.copy(), PissaConfig(rank, method=kind, seed=seed)).train()


def factors(model: Any, side: str) -> list[Tensor]:
    """The trainable A's or B's of all layers."""
    return [p for name, p in model.named_parameters() if p.requires_grad and f"lora_{side}." in name]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of copies."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def first_gradients(memory: InMemory, method: str, rank: int) -> dict[str, Any]:
    """What the seeds' gradients on one batch have in common."""
    found: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for seed in START_SEEDS:
        model = adapted(memory, method, seed, rank)
        memory.first_loss(model).backward()
        for side in SIDES:
            found[side].append(flat([p.grad for p in factors(model, side) if p.grad is not None]))
    return {side: in_the_plane(torch.stack(vectors)) for side, vectors in found.items()}


def in_the_plane(vectors: Tensor) -> dict[str, Any]:
    """Norms of vectors (seeds, entries), cosines with the others' sum, unit vectors in their two main directions."""
    norms = vectors.norm(dim=1, dtype=torch.float64)
    unit = vectors.double() / norms.clamp_min(1e-30)[:, None]
    gram = unit @ unit.mT
    values, directions = torch.linalg.eigh(gram)
    plane = directions[:, -2:].flip(1) * values[-2:].flip(0).clamp_min(0).sqrt()
    if float(norms.max()) == 0:
        return {"norms": norms.tolist(), "cosines": [], "plane": plane.tolist()}
    others = unit.sum(0) - unit
    cosines = (unit * others).sum(1) / others.norm(dim=1)
    return {"norms": norms.tolist(), "cosines": cosines.tolist(), "plane": plane.tolist()}


def first_steps(memory: InMemory, method: str, rate: float, seed: int, rank: int) -> dict[str, Any]:
    """Train; how far the factors are on their way after each of the first steps."""
    model = adapted(memory, method, seed, rank)
    steps = memory.task.steps
    kept: dict[str, list[Tensor]] = {side: [flat(factors(model, side))] for side in SIDES}

    def keep(step: int) -> None:
        if step <= FIRST or step == steps:
            for side in SIDES:
                kept[side].append(flat(factors(model, side)))

    found = memory.train(model, rate, seed, schedule="constant", warmup_ratio=0, after_step=keep)
    return {
        "losses": found.losses,
        "loss_after_five": statistics.fmean(found.losses[FIRST : 2 * FIRST]),
        "held_out_loss": memory.loss(model),
        **{f"way_{side}": shares(points) for side, points in kept.items()},
    }


def shares(points: Sequence[Tensor]) -> list[float]:
    """The share of the way from the first point to the last that each of those between has gone, from 0 on."""
    whole = (points[-1] - points[0]).double()
    length = float(whole.square().sum())
    return [float((point - points[0]).double() @ whole) / length for point in points[:-1]]


def parts_of(starts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """The claims of table 11 and figure 18, each as a difference that should be positive."""
    lora, pissa = (next(row for row in starts if row["method"] == method) for method in METHODS)
    parts = {
        "LoRA's gradient of A is 0": mean_interval([1.0 if norm == 0 else -1.0 for norm in lora["A"]["norms"]]),
        f"LoRA's gradient of B: cosine with other seeds' below {SAME}": mean_interval(
            [SAME - value for value in lora["B"]["cosines"]]
        ),
    }
    for side in SIDES:
        name = f"PiSSA's gradient of {side}: cosine with other seeds' above {SAME}"
        parts[name] = mean_interval([value - SAME for value in pissa[side]["cosines"]])
    for other, words in (("lora", "LoRA at the same rate"), (TUNED, "LoRA at its own")):
        for side in SIDES:
            name = f"share of {side}'s way in {FIRST} steps, PiSSA less {words}"
            parts[name] = advantage(rows, last_share(side), {"method": "pissa"}, {"method": other})
        left, right = (by_seed(rows, "loss_after_five", method=method) for method in (other, "pissa"))
        parts[f"loss in the {FIRST} steps after those, {words} less PiSSA"] = paired_difference(left, right)
    return parts


def last_share(side: str) -> Any:
    """What to take of a row."""
    return lambda row: row[f"way_{side}"][-1]


def draw(results: Mapping[str, Any]) -> Any:
    """Gradients in their plane, the share of the way by step, and the loss."""
    figure, (plane, way, losses) = new_figure(1, 3)
    for row in results["starts"]:
        for side, marker in zip(SIDES, "os", strict=True):
            x, y = zip(*row[side]["plane"], strict=True)
            label = f"{row['method']}, {side}"
            plane.scatter(x, y, marker=marker, s=40, alpha=0.7, color=look_of(row["method"]).colour, label=label)
    plane.set(title="gradients at step 0, one point a seed", xlabel="first direction", ylabel="second direction")
    for method in RUNS:
        rows = [row for row in results["runs"] if row["method"] == method]
        look = look_of(method)
        label = f"{method.removesuffix(', its own rate')} at {rows[0]['rate']:.2g}"
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            curve = [statistics.fmean(values) for values in zip(*(row[f"way_{side}"] for row in rows), strict=True)]
            way.plot(curve, style, marker=".", color=look.colour, label=f"{label}, {side}")
        curves = [row["losses"] for row in rows]
        band(losses, range(1, len(curves[0]) + 1), curves, label=label, look=look)
    way.set(title="share of the way to the last step's factors", xlabel="step")
    losses.set(title="training loss", xlabel="step", yscale="log")
    for panel in (plane, way, losses):
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "At step 0 LoRA's gradient of A is zero and its gradient of B changes with the seed, PiSSA's stay the same; in "
    "five steps PiSSA covers more of the way to its later parameters, and its loss falls further (PiSSA, appendix M)",
    run,
    draw,
    minutes=5,
    seed_count=5,
)
