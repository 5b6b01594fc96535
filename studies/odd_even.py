"""The paper's toy: a two-layer MLP learns the odd digits and is then adapted to the even ones.

Full fine-tuning, LoRA and PiSSA of the same rank see the same batches. The claim is made at one learning rate; as the
three have learning rates of their own, every method is trained at each of a grid, and compared at equal rates and at
each one's best (its lowest mean loss over all steps and seeds). MNIST is taken from the data folder; without it,
scikit-learn's 8 by 8 digits.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.adapted.adapt import adapt
from pissa.config import PissaConfig
from pissa.errors import MissingExtraError

from .figures import band, look_of, new_figure
from .fit import fit
from .images import image_loss, mnist
from .interval import Interval, paired_difference
from .judge import advantage, by_seed, verdict_of
from .study import Outcome, Settings, Study

NAME = "odd-even"
METHODS = ("full", "lora", "pissa")
HIDDEN = 256
BEST = "each at its best rate"
BATCH = 64
PRETRAINING = 400
PRETRAINING_RATE = 1e-3
Data = tuple[Tensor, Tensor]


def run(settings: Settings) -> Outcome:
    """Pretrain on odd digits, adapt to even ones with every method and learning rate."""
    data = str(settings.data_set("mnist")) if settings.has_data_set("mnist") and settings.scale != "quick" else None
    steps = settings.pick(quick=20, default=150, full=500)
    rates = settings.pick(
        quick=[1e-3, 1e-2],
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        full=[3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    )
    keys = [
        {
            "data": "digits" if data is None else "mnist",
            "rank": rank,
            "steps": steps,
            "rate": rate,
            "seed": s,
            "method": m,
        }
        for rank in settings.pick(quick=[4], default=[4], full=[1, 2, 4, 8])
        for rate in rates
        for s in settings.seeds
        for m in METHODS
    ]
    rows = settings.grid(NAME, keys, lambda **key: adapted_run(**{**key, "data": data}))
    rank = 4
    best = {method: best_rate(rows, method, rank) for method in METHODS}
    parts = parts_of(rows, best, rank)
    results = {"rows": rows, "best_rate": best, "rank": rank, "parts": {k: part.as_dict() for k, part in parts.items()}}
    return Outcome(results, verdict_of(parts), figures_of(rows, best, parts, rank))


@lru_cache(maxsize=2)
def digits(data: str | None) -> Data:
    """(n, pixels) fp32 in [−1, 1] and labels; of MNIST's ten thousand test digits or of scikit-learn's."""
    if data is not None:
        images = mnist(Path(data), 28)
        return images.pixels[:, 0].flatten(1).float() / 127.5 - 1, images.labels
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("without MNIST this study needs scikit-learn: pip install --group studies") from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels).float() / 8 - 1, torch.as_tensor(labels).long()


def parts_for(data: str | None, odd: bool, seed: int) -> tuple[Data, Data]:
    """Training and held-out digits of one parity, 80 to 20."""
    pixels, labels = digits(data)
    places = torch.nonzero(labels % 2 == int(odd))[:, 0]
    order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    first = round(0.8 * len(order))
    return (pixels[order[:first]], labels[order[:first]]), (pixels[order[first:]], labels[order[first:]])


def batches(data: Data, seed: int) -> Iterator[Data]:
    """Random batches for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data[1]), (BATCH,), generator=generator)
        yield data[0][chosen], data[1][chosen]


@lru_cache(maxsize=8)
def pretrained(data: str | None, seed: int) -> nn.Module:
    """The MLP that knows the odd digits."""
    train, _ = parts_for(data, True, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(train[0].shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    model = nn.Sequential(*layers)
    fit(model, batches(train, seed), image_loss, learning_rate=PRETRAINING_RATE, steps=PRETRAINING)
    return model


def adapted_run(data: str | None, rank: int, steps: int, rate: float, seed: int, method: str) -> dict[str, Any]:
    """Adapt the pretrained MLP to the even digits."""
    model: Any = copy.deepcopy(pretrained(data, seed))
    train, test = parts_for(data, False, seed)
    if method != "full":
        kind = "lora-kaiming" if method == "lora" else "pissa"
        model = adapt(model, PissaConfig(rank, method=kind, target_modules=("0", "2"), seed=seed))
    found = fit(model, batches(train, seed + 1000), image_loss, learning_rate=rate, steps=steps, schedule="constant")
    with torch.no_grad():
        right = (model(test[0]).argmax(-1) == test[1]).float().mean()
    last = max(1, steps // 10)
    return {
        "losses": found.losses,
        "first_grad_norm": found.grad_norms[0],
        "mean_loss": statistics.fmean(found.losses),
        "final_loss": statistics.fmean(found.losses[-last:]),
        "accuracy": float(right),
    }


def best_rate(rows: Sequence[Mapping[str, Any]], method: str, rank: int) -> float:
    """The learning rate with the lowest mean loss over all steps."""
    rates = sorted({row["rate"] for row in rows})
    means = {r: statistics.fmean(by_seed(rows, "mean_loss", method=method, rate=r, rank=rank)) for r in rates}
    return min(means, key=means.__getitem__)


def parts_of(rows: Sequence[Mapping[str, Any]], best: Mapping[str, float], rank: int) -> dict[str, Interval]:
    """LoRA's loss less PiSSA's: over all steps (faster) and at the end, at equal and at best rates."""
    parts = {}
    for name, value in (("mean over the steps", "mean_loss"), ("at the end", "final_loss")):
        for rate in sorted({row["rate"] for row in rows}):
            sides = ({"method": method, "rate": rate, "rank": rank} for method in ("lora", "pissa"))
            parts[f"{name}, both at {rate:g}"] = advantage(rows, value, *sides)
        left, right = (by_seed(rows, value, method=m, rate=best[m], rank=rank) for m in ("lora", "pissa"))
        parts[f"{name}, {BEST}"] = paired_difference(left, right)
    return parts


def figures_of(
    rows: Sequence[Mapping[str, Any]], best: Mapping[str, float], parts: Mapping[str, Interval], rank: int
) -> str:
    """What each reaches at its best rate, then LoRA's loss less PiSSA's."""
    lines = []
    for method in METHODS:
        loss, accuracy = (
            statistics.fmean(by_seed(rows, value, method=method, rate=best[method], rank=rank))
            for value in ("final_loss", "accuracy")
        )
        lines.append(f"{method} at {best[method]:g}: final loss {loss:.3f}, accuracy {accuracy:.1%}")
    equal = [part for name, part in parts.items() if "both at" in name]
    shown, against = sum(part.above_zero for part in equal), sum(part.below_zero for part in equal)
    return (
        f"rank {rank}; {'; '.join(lines)}. Loss of LoRA less that of PiSSA at equal rates: positive in {shown} of "
        f"{len(equal)} comparisons, negative in {against}"
    )


def draw(results: Mapping[str, Any]) -> Any:
    """Loss by step at one equal rate and at each one's best, and the mean loss against the rate."""
    figure, (equal, best, sweep) = new_figure(1, 3)
    rows = [row for row in results["rows"] if row["rank"] == results["rank"]]
    rates = sorted({row["rate"] for row in rows})
    shared = min(rates, key=lambda rate: abs(rate - 1e-3))
    for method in METHODS:
        look = look_of(method)
        for panel, rate in ((equal, shared), (best, results["best_rate"][method])):
            curves = [row["losses"] for row in rows if (row["method"], row["rate"]) == (method, rate)]
            label = method if panel is equal else f"{method} at {rate:g}"
            band(panel, range(1, len(curves[0]) + 1), curves, label=label, look=look)
        means = [statistics.fmean(by_seed(rows, "mean_loss", method=method, rate=rate)) for rate in rates]
        sweep.plot(rates, means, marker=look.marker, label=method, **look.line)
    equal.set(title=f"all at {shared:g}", xlabel="step", ylabel="training loss", yscale="log")
    best.set(title="each at its best learning rate", xlabel="step", yscale="log")
    sweep.set(title="mean loss over all steps", xlabel="learning rate", xscale="log", yscale="log")
    for panel in (equal, best):
        panel.legend(frameon=False)
    return figure


STUDY = Study(
    NAME,
    "An MLP that knows the odd digits learns the even ones faster with PiSSA than with LoRA, to a lower loss in "
    "as many steps (PiSSA, figure 2a)",
    run,
    draw,
    minutes=2,
    seed_count=5,
)
