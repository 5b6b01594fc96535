"""The report's variants on images: a ViT pretrained on three domains of PACS and adapted to the fourth, or to MNIST.

The report takes google/vit-base-patch16-224 (`--model`), and adapts it to all of PACS. No such weights come with this
package, so a small ViT is pretrained first, on art, cartoons and photos; it learns sketches, and with `--full` digits
with a new head, on which the report looks at the first 100 steps (by default they are those on sketches).
Every linear layer is adapted, the head is trained in full, and all methods have one learning rate, as in the report. It
favours PiSSA, whose factors are larger: so LoRA and PiSSA run once more at three times that rate. CURA has its optimal
core, the default here; the report prints the inverse of the intersection, whose residual can be large. A small
convolutional network does the same (the paper's first open question), and each method's split is timed at a shape of
ViT-base.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.hub import first_line
from ...config import PissaConfig
from ...errors import CheckpointError
from ...live.apply import adapt
from ...split import split_weight
from ..figures import colour_of, new_figure
from ..fit import fit
from ..image_models import pretrained, with_new_head
from ..images import DOMAINS, Images, accuracy, image_loss, mnist, pacs, patterns
from ..interval import Interval, mean_interval
from .judge import advantage, by_seed, looked_at, sentence, verdict_of
from .language import RUNS
from .study import Outcome, Settings, Study

NAME = "vision"
METHODS = ("lora", "pissa", "random-pissa", "robust-pissa", "cura")
RANKS = (6, 8, 10)
MNIST_RANK = 8
ADAPTED_TO = "sketch"
SIZE = 48
QUICK_SIZE = 16
SEED_STEP = 100
"""The report's seeds are 0, 100, 200, …"""
PATTERN_CLASSES = 4
VIT_BASE = (768, 768)
"""The shape of an attention layer's weights in ViT-base."""
FASTER = 3
"""Times the learning rate, of LoRA and PiSSA once more, at `FASTER_RANK`."""
FASTER_RANK = 8


def run(settings: Settings) -> Outcome:
    """Train every method on both tasks and time its initialisation."""
    plan = _plan(settings)
    seeds = [SEED_STEP * seed for seed in settings.seeds]
    networks = ("vit",) if settings.model is not None else ("vit", "cnn")
    keys = [
        {"part": "pacs", "network": network, "method": method, "rank": rank, "seed": seed, **plan["pacs"]}
        for network in networks
        for method in METHODS
        for rank in (plan["ranks"] if network == "vit" else RANKS[1:2])
        for seed in seeds
    ]
    digits = settings.scale != "default"
    keys += [
        {"part": "mnist", "network": "vit", "method": method, "rank": MNIST_RANK, "seed": seed, **plan["mnist"]}
        for method in METHODS
        for seed in seeds
        if digits
    ]
    faster = [
        {**key, "method": method, "rate": FASTER * key["rate"]}
        for key in keys
        for method in ("lora", "pissa")
        if (key["part"], key["network"], key["method"], key["rank"]) == ("pacs", "vit", "lora", FASTER_RANK)
    ]
    rows = settings.grid(NAME, keys, lambda **key: _measure(settings, **key))
    rows_faster = settings.grid(NAME, faster, lambda **key: _measure(settings, **key))
    shape = settings.pick(quick=(48, 32), default=VIT_BASE, full=VIT_BASE)
    timings = settings.grid(
        NAME, [{"part": "initialisation", "method": m, "shape": list(shape)} for m in METHODS], _timed
    )
    before = settings.grid(
        NAME, [{"part": "before", "network": network} for network in networks], lambda **key: _before(settings, **key)
    )
    results = {
        "runs": rows,
        "faster": rows_faster,
        "initialisation": timings,
        "before": before,
        "every": _every(settings),
        **_summary(rows),
        "early": _where_early(rows)["part"],
    }
    parts = _parts(rows, rows_faster)
    seconds = {row["method"]: row["seconds"] for row in timings}
    results["parts"] = {name: part.as_dict() for name, part in parts.items()}
    figures = (
        f"accuracy on {ADAPTED_TO} over ranks: {_listed(results['pacs'])} (CURA with its optimal core); "
        f"{sentence(parts)}{looked_at(settings)}; "
        f"splitting {shape[0]}×{shape[1]}: "
        + ", ".join(f"{method} {value * 1000:.0f} ms" for method, value in seconds.items())
        + (f"; convolutional network: {_listed(results['cnn'])}" if results["cnn"] else "")
    )
    return Outcome(results, verdict_of(parts), figures)


def _plan(settings: Settings) -> dict[str, Any]:
    """Steps, batch and learning rate of both tasks."""
    rate = 1e-3
    return {
        "ranks": settings.pick(quick=RANKS[1:2], default=RANKS, full=RANKS),
        "pacs": settings.pick(
            quick={"steps": 1, "batch": 8, "rate": rate},
            default={"steps": 120, "batch": 32, "rate": rate},
            full={"steps": 490, "batch": 32, "rate": rate},
        ),
        "mnist": settings.pick(
            quick={"steps": 2, "batch": 8, "rate": rate},
            default={"steps": 100, "batch": 32, "rate": rate},
            full={"steps": 100, "batch": 32, "rate": rate},
        ),
    }


def _measure(
    settings: Settings, part: str, network: str, method: str, rank: int, seed: int, steps: int, batch: int, rate: float
) -> dict[str, Any]:
    """Adapt the pretrained network and train it once."""
    train, test = (_task(settings, part)).split(0.8, seed)
    model = copy.deepcopy(_network(settings, network))
    if part == "mnist" or settings.model is not None:
        model = with_new_head(model, int(train.labels.max()) + 1, seed)
    config = PissaConfig(
        rank=rank,
        method=method if method != "lora" else "lora-kaiming",  # pyright: ignore[reportArgumentType]
        target_modules=r".*convs\.\d+" if network == "cnn" else "all-linear",
        modules_to_save=("classifier",),
        seed=seed,
    )
    start = time.process_time()
    adapted = adapt(model, config).train()
    seconds = time.process_time() - start
    if torch.cuda.is_available():
        adapted.cuda()
    seen: list[float] = []
    every = _every(settings)
    few = test[: settings.pick(quick=8, default=500, full=len(test))]

    def look(step: int) -> None:
        if part == "mnist" and step % every == 0:
            seen.append(accuracy(adapted, few))

    found = fit(adapted, train.batches(batch, seed), image_loss, learning_rate=rate, steps=steps, after_step=look)
    return {
        "accuracy": accuracy(adapted, test),
        "accuracy_by_step": seen,
        "losses": found.losses,
        "first_grad_norm": found.grad_norms[0],
        "grad_norms": found.grad_norms,
        "init_seconds": seconds,
    }


def _every(settings: Settings) -> int:
    """Steps between two measurements of accuracy on MNIST."""
    return settings.pick(quick=1, default=10, full=10)


def _timed(part: str, method: str, shape: list[int]) -> dict[str, Any]:
    """CPU seconds in which a matrix is split, the median of three times after a first one."""
    config = PissaConfig(rank=MNIST_RANK, method=method if method != "lora" else "lora-kaiming")  # pyright: ignore[reportArgumentType]
    W = decaying(*shape)
    times = []
    for _ in range(4):
        start = time.process_time()
        split_weight(W, config)
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times[1:])}


def decaying(rows: int, columns: int) -> torch.Tensor:
    """A random matrix whose singular values fall as 1/√k, as those of trained weights roughly do."""
    generator = torch.Generator().manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return U * (S.new_tensor(range(1, len(S) + 1)).rsqrt()) @ Vh


def _before(settings: Settings, part: str, network: str) -> dict[str, Any]:
    """Accuracy on the domain to come, before adaptation."""
    if settings.model is not None:
        return {"accuracy": None}
    return {"accuracy": accuracy(_network(settings, network), _task(settings, "pacs"))}


def _task(settings: Settings, part: str) -> Images:
    """What is adapted to."""
    if settings.scale == "quick":
        return patterns(40, PATTERN_CLASSES, QUICK_SIZE, domain=3 if part == "pacs" else 4)
    size = _input_size(settings)
    if part == "mnist":
        return _mnist(settings.data_set("mnist"), size)
    domains = _pacs(settings.data_set("pacs"), size)
    return domains[ADAPTED_TO] if settings.model is None else _joined(domains, DOMAINS)


def _network(settings: Settings, kind: str) -> Any:
    """The network to adapt: `--model`, or the small one of this kind, pretrained."""
    if settings.model is not None:
        return _from_hub(settings.model)
    others = [name for name in DOMAINS if name != ADAPTED_TO]
    quick = settings.scale == "quick"
    images = (
        _joined({str(d): patterns(8, PATTERN_CLASSES, QUICK_SIZE, domain=d) for d in range(3)}, ("0", "1", "2"))
        if quick
        else _joined(_pacs(settings.data_set("pacs"), SIZE), others)
    )
    return pretrained(
        kind,
        images,
        settings.out / RUNS,
        classes=int(images.labels.max()) + 1,
        steps=settings.pick(quick=1, default=1000, full=4000),
        batch_size=settings.pick(quick=8, default=64, full=64),
        about={"domains": others, "quick": quick},
    )


def _input_size(settings: Settings) -> int:
    return SIZE if settings.model is None else int(_from_hub(settings.model).config.image_size)


@lru_cache(maxsize=1)
def _from_hub(source: str) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        return AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load an image classifier from {source}: {first_line(error)}") from error


@lru_cache(maxsize=2)
def _pacs(directory: Path, size: int) -> dict[str, Images]:
    return pacs(directory, size)


@lru_cache(maxsize=2)
def _mnist(directory: Path, size: int) -> Images:
    return mnist(directory, size)


def _joined(domains: Mapping[str, Images], names: Sequence[str]) -> Images:
    return Images(
        torch.cat([domains[name].pixels for name in names]), torch.cat([domains[name].labels for name in names])
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with their intervals: on PACS by method and by rank, of the convolutional network, on MNIST."""
    ranks = sorted({row["rank"] for row in rows if row["part"] == "pacs" and row["network"] == "vit"})
    vit = {"part": "pacs", "network": "vit"}

    def table(value: Any, **chosen: Any) -> dict[str, Any]:
        found = {method: by_seed(rows, value, method=method, **chosen) for method in METHODS}
        return {method: mean_interval(values).as_dict() for method, values in found.items() if values}

    return {
        "pacs": table("accuracy", **vit),
        "pacs_by_rank": {str(rank): table("accuracy", **vit, rank=rank) for rank in ranks},
        "cnn": table("accuracy", part="pacs", network="cnn"),
        "early_loss": table(_early, **_where_early(rows)),
        "first_grad_norm": table("first_grad_norm", **_where_early(rows)),
    }


def _early(row: Mapping[str, Any]) -> float:
    """Mean training loss over the first 100 steps."""
    return statistics.fmean(row["losses"][:100])


def _where_early(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs whose first steps are looked at."""
    return {"part": "mnist" if any(row["part"] == "mnist" for row in rows) else "pacs", "network": "vit"}


def _parts(rows: Sequence[Mapping[str, Any]], faster: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """What the report claims, as differences that it says are positive."""
    vit: dict[str, Any] = {"part": "pacs", "network": "vit"}
    low: dict[str, Any] = {**vit, "rank": RANKS[:2]}
    early = _where_early(rows)

    def versus(value: Any, where: Mapping[str, Any], left: str, right: str) -> Interval:
        return advantage(rows, value, {**where, "method": left}, {**where, "method": right})

    return {
        "PiSSA − LoRA": versus("accuracy", vit, "pissa", "lora"),
        f"at {FASTER} times the rate, rank {FASTER_RANK}": advantage(
            faster, "accuracy", {"method": "pissa"}, {"method": "lora"}
        ),
        "Random PiSSA − LoRA": versus("accuracy", vit, "random-pissa", "lora"),
        "Robust PiSSA − PiSSA at ranks 6 and 8": versus("accuracy", low, "robust-pissa", "pissa"),
        "training loss over the first 100 steps: PiSSA − CURA": versus(_early, early, "pissa", "cura"),
        "LoRA − CURA": versus(_early, early, "lora", "cura"),
        "first gradient norm: CURA − PiSSA": versus("first_grad_norm", early, "cura", "pissa"),
    }


def _listed(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{method} {entry['mean']:.3f}" for method, entry in table.items())


def draw(results: Mapping[str, Any]) -> Any:
    """Accuracy by rank, the first steps' loss and gradient norm, and the convolutional network."""
    figure, panels = new_figure(2, 2)
    for method in METHODS:
        colour = colour_of(method)
        entries = {int(rank): table[method] for rank, table in results["pacs_by_rank"].items()}
        means = [entry["mean"] for entry in entries.values()]
        spread = [
            [entry["mean"] - min(entry["values"]) for entry in entries.values()],
            [max(entry["values"]) - entry["mean"] for entry in entries.values()],
        ]
        panels[0].errorbar(list(entries), means, spread, label=method, color=colour, capsize=3)
        where = (results["early"], "vit", method)
        rows = [row for row in results["runs"] if (row["part"], row["network"], row["method"]) == where]
        losses = [statistics.fmean(column) for column in zip(*(row["losses"] for row in rows), strict=True)]
        panels[1].plot(range(1, len(losses) + 1), losses, color=colour)
    panels[0].set(title=f"ViT adapted to {ADAPTED_TO}es (range over seeds)", xlabel="rank", ylabel="accuracy")
    panels[0].set_xticks(list(map(int, results["pacs_by_rank"])))
    learnt = "MNIST" if results["early"] == "mnist" else f"{ADAPTED_TO}es"
    panels[1].set(title=f"ViT adapted to {learnt}", xlabel="step", ylabel="training loss", yscale="log")
    panels[0].legend(frameon=False, fontsize=8)
    _bars(panels[2], results["first_grad_norm"], f"first gradient norm on {learnt}", "norm")
    if results["cnn"]:
        _bars(panels[3], results["cnn"], f"convolutional network adapted to {ADAPTED_TO}es", "accuracy")
    else:
        panels[3].set_visible(False)
    return figure


def _bars(panel: Any, table: Mapping[str, Any], title: str, label: str) -> None:
    """A mean for each method, its seeds as dots."""
    panel.bar(list(table), [entry["mean"] for entry in table.values()], color=[colour_of(name) for name in table])
    for place, entry in enumerate(table.values()):
        panel.plot([place] * len(entry["values"]), entry["values"], "k.", markersize=5)
    panel.set(title=title, ylabel=label)
    panel.tick_params(axis="x", labelrotation=20)


STUDY = Study(
    NAME,
    "On images PiSSA and its random and robust variants beat LoRA, the robust one is best at low ranks, and CURA "
    "learns fastest in the first 100 steps, with larger first gradients (report, table 1, figures 1, 2, 4, 5)",
    run,
    draw,
    minutes=9,
)
