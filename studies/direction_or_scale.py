"""What in PiSSA helps: the principal directions, or that its factors are larger than LoRA's?

    arm                B0                     A0                     starts
    lora               0                      Kaiming                at the base
    lora, principal    0                      c·V_rᵀ                 at the base; ‖A0‖ as LoRA's
    pissa              U_r S_r^½              S_r^½ V_rᵀ             offset
    pissa, small       t·U_r S_r^½            t·S_r^½ V_rᵀ           offset; ‖A0‖ as LoRA's
    random             P S_r^½                S_r^½ Qᵀ               offset; P, Q random and orthonormal
    random, small      t·P S_r^½              t·S_r^½ Qᵀ             offset; ‖A0‖ as LoRA's

Offset means W + BA − B0A0, so that every arm starts at the base's function. A larger factor multiplies the other's
gradient: that is a larger learning rate, which LoRA can be given as well. So every arm's own rate is looked for first,
over a grid with one seed, and the arms are compared at those with all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pissa.adapted.adapt import attach, attach_offset, peft_config
from pissa.config import PissaConfig
from pissa.decompose.svd import truncated_svd
from pissa.live.record import Record
from pissa.live.targets import resolve_targets
from pissa.split import derive_seed

from .figures import new_figure, search_lines, seed_dots
from .interval import Interval, mean_interval
from .judge import advantage, by_seed, verdict_of
from .lm import InMemory, LanguageTask, final_loss, find_rates, language_task
from .study import Outcome, Settings, Study

NAME = "direction-or-scale"
ARMS = ("lora", "lora, principal", "pissa", "pissa, small", "random", "random, small")
RANK = 8


def run(settings: Settings) -> Outcome:
    """Find every arm's learning rate, then train it there with every seed."""
    task = language_task(settings)
    memory = cache(lambda: InMemory(task))

    def measure(task: LanguageTask, /, method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        return _train(memory().on(task), method, rate, seed)

    search = find_rates(settings, NAME, task, ARMS, measure)
    keys = [
        {"method": arm, "rate": search.best[arm], "seed": seed, "task": task.name, "steps": task.steps}
        for arm in ARMS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: measure(task, **key))
    parts = _parts(rows)
    table = {arm: mean_interval(by_seed(rows, "held_out_loss", method=arm)).as_dict() for arm in ARMS}
    results = {
        "task": task.name,
        "rank": RANK,
        "search": search.as_dict(),
        "runs": rows,
        "held_out_loss": table,
        "parts": {name: part.as_dict() for name, part in parts.items()},
        "scales": {name: difference.as_dict() for name, difference in _scales(rows).items()},
    }
    figures = f"{task.name}; held-out loss at each arm's rate: " + ", ".join(
        f"{arm} {table[arm]['mean']:.3f} ({search.best[arm]:.2g})" for arm in ARMS
    )
    figures += "; " + ", ".join(f"{name} {difference}" for name, difference in _scales(rows).items())
    return Outcome(results, verdict_of(parts), figures)


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """What the paper's explanation says: by how much principal directions lower the held-out loss."""
    return {
        "gain of principal over random directions, at PiSSA's norms": _gain(rows, "random", "pissa"),
        "at LoRA's norms": _gain(rows, "random, small", "pissa, small"),
        "in LoRA's A": _gain(rows, "lora", "lora, principal"),
    }


def _scales(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """The other explanation, and what both come to."""
    return {
        "gain of PiSSA's norms over LoRA's, along principal directions": _gain(rows, "pissa, small", "pissa"),
        "along random ones": _gain(rows, "random, small", "random"),
        "gain of PiSSA over LoRA": _gain(rows, "lora", "pissa"),
    }


def _gain(rows: Sequence[Mapping[str, Any]], left: str, right: str) -> Interval:
    """Held-out loss of one arm less that of another, each at its rate."""
    return advantage(rows, "held_out_loss", {"method": left}, {"method": right})


def _train(memory: InMemory, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One run of one arm."""
    model, norms = build(memory.copy(), arm, seed)
    seen = memory.train(model, rate, seed)
    return {
        "held_out_loss": memory.loss(model),
        "final_loss": final_loss(seen.losses),
        "losses": seen.losses,
        "first_grad_norm": seen.grad_norms[0],
        "norms": norms,
    }


def build(model: Any, arm: str, seed: int) -> tuple[Any, dict[str, float]]:
    """A model adapted as an arm says, and the mean Frobenius norms of its initial factors."""
    config = PissaConfig(rank=RANK, method="lora-kaiming" if arm.startswith("lora") else "pissa", seed=seed)
    targets = resolve_targets(model, config)
    factors = {
        target.name: initial_factors(target.place.matrices().float(), arm, derive_seed(seed, target.name))
        for target in targets
    }
    wrap = peft_config(model, targets, config)
    record = Record(config)
    if arm.startswith("lora"):
        adapted = attach(model, wrap, factors, record, subtract=False)
    else:
        adapted = attach_offset(model, wrap, factors, record)
    mean = {name: sum(float(pair[i].norm()) for pair in factors.values()) / len(factors) for i, name in enumerate("AB")}
    return adapted, mean


def initial_factors(W: Tensor, arm: str, seed: int) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of an arm, at scale 1, for a weight (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    kaiming = ((2 * torch.rand(RANK, W.shape[1], generator=generator) - 1) / W.shape[1] ** 0.5).to(W.device)
    if arm == "lora":
        return kaiming, W.new_zeros(len(W), RANK)
    U, S, Vh, _ = truncated_svd(W, RANK)
    if arm.startswith("random"):
        sizes = (len(W), W.shape[1])
        U, V = (torch.linalg.qr(torch.randn(size, RANK, generator=generator))[0].to(W.device) for size in sizes)
        Vh = V.T
    if arm == "lora, principal":
        return Vh * (kaiming.norm() / RANK**0.5), W.new_zeros(len(W), RANK)
    A, B = S.sqrt()[:, None] * Vh, U * S.sqrt()
    shrink = float(kaiming.norm() / A.norm()) if arm.endswith("small") else 1.0
    return shrink * A, shrink * B


def draw(results: Mapping[str, Any]) -> Any:
    """The search over learning rates, and the held-out loss of every arm at its own."""
    figure, (search, losses) = new_figure(1, 2, width=5.6)
    lines = {arm: {"linestyle": "--"} for arm in ARMS[1::2]}
    search_lines(search, results["search"], lines)
    seed_dots(losses, results["held_out_loss"], "held-out loss, each at its own rate")
    figure.suptitle(results["task"], fontsize=10)
    return figure


STUDY = Study(
    NAME,
    "PiSSA converges faster because it trains the principal directions (PiSSA, section 3), and not "
    "merely because its factors are larger",
    run,
    draw,
    minutes=8,
    seed_count=5,
)
