"""Where do the first steps go? Gradients at step 0 over seeds, and how far five steps go towards the last ones.

At step 0 LoRA's B is zero, so A gets no gradient, and B's gradient is the weight's seen through a random A; PiSSA's
factors come from the weight, so the seed changes nothing. Gradients of all layers together, one batch, one vector a
seed: their cosines, and their coordinates in the plane that holds most of them (table 11).

For the way, with θ the factors A (or B) of all layers after k of K steps (figure 18):

    share(k) = ⟨θ_k − θ_0, θ_K − θ_0⟩ / ‖θ_K − θ_0‖²
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.read import load_base
from ...config import PissaConfig
from ...live.apply import adapt
from ...train.run import quieten
from ..arithmetic import make_problems
from ..figures import COLOURS, band, colour_of, new_figure
from ..fit import fit
from ..interval import Interval, mean_interval, paired_difference
from .judge import advantage, by_seed, sentence, verdict_of
from .language import batches_in_memory, language_model, response_mean
from .study import Outcome, Settings, Study, model_name

NAME = "gradients"
METHODS = ("lora", "pissa")
SIDES = ("A", "B")
RATE, OWN_RATE = 2e-4, 2e-3
"""PiSSA's learning rate, at which LoRA is compared, and LoRA's own, as a third run."""
FIRST = 5
SAME = 0.99
"""Gradients whose cosine is above this point the same way."""


def run(settings: Settings) -> Outcome:
    """Gradients of every seed, then some training runs with their first steps kept."""
    base = language_model(settings)
    paths = {model_name(base): base}
    rank = settings.pick(quick=4, default=32, full=128)
    seeds = settings.pick(quick=[0, 1, 2], default=[0, 1, 2, 3, 4], full=[0, 1, 2, 3, 4])
    first = {"base": model_name(base), "rank": rank, "batch": settings.pick(quick=2, default=4, full=128)}
    starts = settings.grid(
        f"{NAME}-start",
        [{**first, "method": method, "seeds": seeds} for method in METHODS],
        lambda base, **key: first_gradients(paths[base], **key),
    )
    plan = settings.pick(
        quick={"steps": 8, "batch": 2}, default={"steps": 20, "batch": 2}, full={"steps": 50, "batch": 128}
    )
    keys = [
        {"base": model_name(base), "rank": rank, "method": method, "rate": rate, "seed": seed, **plan}
        for seed in settings.seeds
        for method, rate in (("pissa", RATE), ("lora", RATE), ("lora", OWN_RATE))
    ]
    rows = settings.grid(NAME, keys, lambda base, **key: first_steps(paths[base], **key))
    parts = parts_of(starts, rows)
    results = {"starts": starts, "rows": rows, "parts": {name: part.as_dict() for name, part in parts.items()}}
    return Outcome(results, verdict_of(parts), figures_of(results, parts))


def adapted(base: str, rank: int, method: str, seed: int) -> Any:
    """The model with its adapter, in training mode."""
    kind = "lora-kaiming" if method == "lora" else "pissa"
    return adapt(load_base(base, dtype=torch.float32), PissaConfig(rank, method=kind, seed=seed)).train()


def factors(model: Any, side: str) -> list[Tensor]:
    """The trainable A's or B's of all layers."""
    return [p for name, p in model.named_parameters() if p.requires_grad and f"lora_{side}." in name]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of copies."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def first_gradients(base: str, rank: int, batch: int, method: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Norms, cosines and plane coordinates of the seeds' gradients on one batch."""
    quieten()
    rows, _ = make_problems(0, batch, 0)
    [inputs] = batches_in_memory(base, rows, batch, 1)
    found: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for seed in seeds:
        model = adapted(base, rank, method, seed)
        response_mean(model, inputs).backward()
        for side in SIDES:
            found[side].append(flat([p.grad for p in factors(model, side) if p.grad is not None]))
        del model
    return {side: in_the_plane(torch.stack(vectors)) for side, vectors in found.items()}


def in_the_plane(vectors: Tensor) -> dict[str, Any]:
    """Vectors (seeds, entries): norms, cosines between all pairs, and unit vectors in their two main directions."""
    norms = vectors.norm(dim=1, dtype=torch.float64)
    unit = vectors / norms.clamp_min(1e-30).float()[:, None]
    gram = (unit @ unit.mT).double()
    values, directions = torch.linalg.eigh(gram)
    plane = directions[:, -2:].flip(1) * values[-2:].flip(0).clamp_min(0).sqrt()
    pairs = [float(gram[i, j]) for i in range(len(gram)) for j in range(i)]
    zero = float(norms.max()) == 0
    return {"norms": norms.tolist(), "cosines": [] if zero else pairs, "plane": plane.tolist()}


def first_steps(base: str, rank: int, method: str, rate: float, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """Train; how far the factors are on their way after each of the first steps."""
    quieten()
    model = adapted(base, rank, method, seed)
    kept: dict[str, list[Tensor]] = {side: [flat(factors(model, side))] for side in SIDES}

    def keep(step: int) -> None:
        if step <= FIRST or step == steps:
            for side in SIDES:
                kept[side].append(flat(factors(model, side)))

    rows, _ = make_problems(seed, batch * steps, 0)
    batches = batches_in_memory(base, rows, batch, steps)
    found = fit(
        model,
        batches,
        response_mean,
        learning_rate=rate,
        steps=steps,
        schedule="constant",
        warmup_ratio=0,
        after_step=keep,
    )
    return {
        "losses": found.losses,
        "loss_after_five": statistics.fmean(found.losses[FIRST : 2 * FIRST]),
        "final_loss": statistics.fmean(found.losses[-FIRST:]),
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
    sides = {"left": {"method": "lora", "rate": RATE}, "right": {"method": "pissa", "rate": RATE}}
    own = {"method": "lora", "rate": OWN_RATE}
    parts = {
        "LoRA's gradient of A is 0": mean_interval([1.0 if norm == 0 else -1.0 for norm in lora["A"]["norms"]]),
        f"cosine between seeds of LoRA's gradient of B below {SAME}": mean_interval(
            [SAME - value for value in lora["B"]["cosines"]]
        ),
    }
    for side in SIDES:
        name = f"cosine between seeds of PiSSA's gradient of {side} above {SAME}"
        parts[name] = mean_interval([value - SAME for value in pissa[side]["cosines"]])
    for side in SIDES:
        for rate, other in ((RATE, sides["left"]), (OWN_RATE, own)):
            value = last_share(side)
            name = f"share of {side}'s way in {FIRST} steps, PiSSA less LoRA at {rate:g}"
            parts[name] = advantage(rows, value, sides["right"], other)
    for rate, other in ((RATE, sides["left"]), (OWN_RATE, own)):
        left, right = (by_seed(rows, "loss_after_five", **chosen) for chosen in (other, sides["right"]))
        parts[f"loss in the {FIRST} steps after those, LoRA at {rate:g} less PiSSA"] = paired_difference(left, right)
    return parts


def last_share(side: str) -> Any:
    """What to take of a row."""
    return lambda row: row[f"way_{side}"][-1]


def figures_of(results: Mapping[str, Any], parts: Mapping[str, Interval]) -> str:
    """Cosines, losses, then the parts."""
    lines = []
    for row in results["starts"]:
        for side in SIDES:
            cosines = row[side]["cosines"]
            text = f"cosines {min(cosines):.2f} to {max(cosines):.2f}" if cosines else "0"
            lines.append(f"{row['method']} gradient of {side}: {text}")
    return f"{'; '.join(lines)}. {sentence(parts)}"


def draw(results: Mapping[str, Any]) -> Any:
    """Gradients in their plane, the share of the way by step, and the loss."""
    figure, (plane, way, losses) = new_figure(1, 3)
    for row in results["starts"]:
        for side, marker in zip(SIDES, "os", strict=True):
            x, y = zip(*row[side]["plane"], strict=True)
            label = f"{row['method']}, {side}"
            plane.scatter(x, y, marker=marker, s=40, alpha=0.7, color=colour_of(row["method"]), label=label)
    plane.set(title="gradients at step 0, one point a seed", xlabel="first direction", ylabel="second direction")
    for number, (method, rate) in enumerate((("pissa", RATE), ("lora", RATE), ("lora", OWN_RATE))):
        rows = [row for row in results["rows"] if (row["method"], row["rate"]) == (method, rate)]
        colour = (*[colour_of(method)] * 2, COLOURS[4])[number]
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            curve = [statistics.fmean(values) for values in zip(*(row[f"way_{side}"] for row in rows), strict=True)]
            way.plot(curve, style, marker=".", color=colour, label=f"{method} at {rate:g}, {side}")
        curves = [row["losses"] for row in rows]
        band(losses, range(1, len(curves[0]) + 1), curves, label=f"{method} at {rate:g}", colour=colour)
    way.set(title="share of the way to the last step's factors", xlabel="step")
    losses.set(title="training loss", xlabel="step", yscale="log")
    for panel in (plane, way, losses):
        panel.legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    NAME,
    "At step 0 LoRA's gradient of A is zero and its gradient of B changes with the seed, PiSSA's stay the same; in "
    "five steps PiSSA covers more of the way to its later parameters, and its loss falls further (PiSSA, appendix M)",
    run,
    draw,
    minutes=7,
)
