"""Understanding tasks of GLUE with nine ways to fine-tune an encoder: the paper's table 3 in small.

All methods train the head (and the pooler) in full and have rank 8 on query, key and value, or as many parameters in
bottlenecks. The encoder is all-MiniLM-L6-v2; by default its last two blocks are trained, so that what the frozen ones
below make of a row is computed once, with `--full` all six. `--model microsoft/deberta-v3-base` is the paper's. As in
the paper every method has a learning rate of its own for every task: the one of least loss on rows that are held out of
the training part. The chosen ones are scored on development rows, which no search saw.
AdaLoRA keeps its ranks here: they would be shared out only in the course of far more steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from pissa.errors import TrainingError

from .encoder_task import VALIDATION, batches, glue_rows, is_head, outputs, predict, prepared
from .figures import new_figure, seed_dots
from .fit import Diverged, Fit, fit
from .glue_files import GLUE, score
from .interval import mean_interval, paired_difference
from .judge import by_seed, verdict_of
from .search import Search, search_rates
from .study import Outcome, Settings, Study

NAME = "glue"
LORA_RATES = (6e-4, 2e-3, 6e-3)
RATES = {
    "full": (6e-5, 2e-4, 6e-4),
    "bitfit": (2e-3, 6e-3, 1.8e-2),
    "houlsby": LORA_RATES,
    "pfeiffer": LORA_RATES,
    "lora-gaussian": LORA_RATES,
    "lora-kaiming": LORA_RATES,
    "dora": LORA_RATES,
    "adalora": (2e-3, 6e-3, 1.8e-2),
    "pissa": (3e-4, 9e-4, 2.7e-3),
}
"""Method -> learning rates at which its search begins."""
METHODS = tuple(RATES)
BLOCKS = 2
"""A default pass trains so many of MiniLM's six blocks: more steps say more than more blocks."""
Row = Mapping[str, Any]


def run(settings: Settings) -> Outcome:
    """Every method on every task: its learning rate first, then that with every seed."""
    tasks = ["SST-2", "STS-B"] if settings.scale == "quick" else list(GLUE)
    lengths = {
        "steps": settings.pick(quick=2, default=64, full=2000),
        "batch": settings.pick(quick=4, default=8, full=32),
        "blocks": settings.pick(quick=None, default=BLOCKS, full=None) if settings.model is None else None,
    }
    searches = {
        task: search_rates(settings, NAME, RATES, lambda **key: _search_run(settings, **key), task=task, **lengths)
        for task in tasks
    }
    keys = [
        {"task": task, "method": method, "seed": seed, "rate": searches[task].best[method], **lengths}
        for task in tasks
        for method in METHODS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: _measure(settings, **key))
    average = {method: by_seed(rows, _first, method=method) for method in METHODS}
    parts = {
        f"PiSSA − {other}": paired_difference(average["pissa"], average[other]) for other in METHODS if other != "pissa"
    }
    results = {
        "runs": rows,
        "table": {task: _table(rows, task) for task in tasks},
        "average": {method: mean_interval(values).as_dict() for method, values in average.items()},
        "parts": {name: part.as_dict() for name, part in parts.items()},
        "search": {task: search.as_dict() for task, search in searches.items()},
        "failed": sum(row["failed"] is not None for row in rows),
    }
    figures = (
        f"{_trained(lengths['blocks'])}; "
        f"mean of {', '.join(f'{task} {GLUE[task].metrics[0]}' for task in tasks)} after {lengths['steps']} steps of "
        f"{lengths['batch']} rows: "
        + ", ".join(f"{method} {entry['mean']:.3f}" for method, entry in results["average"].items())
        + f"; learning rates searched for each method and task on {VALIDATION} training rows: "
        + _edges(searches)
        + (f"; {results['failed']} of {len(rows)} runs failed and count as 0" if results["failed"] else "")
    )
    return Outcome(results, verdict_of(parts), figures)


def _trained(blocks: int | None) -> str:
    return "the whole encoder trained" if blocks is None else f"the encoder's last {blocks} blocks trained"


def _table(rows: Sequence[Row], task: str) -> dict[str, Any]:
    """Method -> metric -> its mean over seeds and interval."""
    return {
        method: {
            metric: mean_interval(
                by_seed(rows, lambda row, m=metric: row["scores"][m], task=task, method=method)
            ).as_dict()
            for metric in GLUE[task].metrics
        }
        for method in METHODS
    }


def _edges(searches: Mapping[str, Search]) -> str:
    """Which best rates no worse ones enclose."""
    found = [f"{method} on {task}" for task, search in searches.items() for method in search.at_edge]
    return f"at the end of the grid of {', '.join(found)}" if found else "all within their grids"


def _first(row: Row) -> float:
    return row["scores"][GLUE[row["task"]].metrics[0]]


def _measure(
    settings: Settings, task: str, method: str, seed: int, rate: float, steps: int, batch: int, blocks: int | None
) -> dict[str, Any]:
    """Train one model and score it on development rows; all its scores are 0 where training failed."""
    chosen = GLUE[task]
    train, _, test = glue_rows(settings, task)
    inputs, model = prepared(settings, chosen, method, blocks, seed)
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))
    try:
        seen, failed = _fit(model, batches(train, inputs, batch, seed), rate, steps, seed), None
        scores = score(chosen, predict(model, inputs, test), [row.label for row in test])
    except Diverged as error:
        seen, failed, scores = error.seen, str(error), dict.fromkeys(chosen.metrics, 0.0)
    return {
        "scores": scores,
        "failed": failed,
        "losses": seen.losses,
        "trained_parameters": trained,
        "development_rows": len(test),
    }


def _search_run(
    settings: Settings, task: str, method: str, seed: int, rate: float, steps: int, batch: int, blocks: int | None
) -> dict[str, Any]:
    """Train one model; its loss on training rows held out for this."""
    chosen = GLUE[task]
    train, validation, _ = glue_rows(settings, task)
    inputs, model = prepared(settings, chosen, method, blocks, seed)
    _fit(model, batches(train, inputs, batch, seed), rate, steps, seed)
    found = outputs(model, inputs, validation)
    labels = torch.tensor([row.label / chosen.most for row in validation])
    loss = float(mse_loss(found[:, 0], labels) if chosen.classes == 1 else cross_entropy(found, labels.long()))
    if not math.isfinite(loss):
        raise TrainingError(f"held-out loss {loss:g} after {steps} steps at {rate:g}; lower the learning rate")
    return {"held_out_loss": loss}


def _fit(model: Any, rows: Iterable[Mapping[str, Tensor]], rate: float, steps: int, seed: int) -> Fit:
    """Train with dropout of this seed."""

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).loss

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fit(model.train(), rows, loss, learning_rate=rate, steps=steps, schedule="linear")


def draw(results: Mapping[str, Any]) -> Any:
    """Every task's first metric by method, its seeds as dots, and the mean over tasks."""
    tasks = list(results["table"])
    figure, panels = new_figure(1, len(tasks) + 1, width=3.6)
    entries = [{m: e[GLUE[task].metrics[0]] for m, e in results["table"][task].items()} for task in tasks]
    titles = [f"{task}: {GLUE[task].metrics[0]}" for task in tasks]
    for panel, table, title in zip(panels, [*entries, results["average"]], [*titles, "mean"], strict=True):
        seed_dots(panel, table, title)
    return figure


STUDY = Study(
    NAME,
    "On GLUE PiSSA beats full fine-tuning, BitFit, bottleneck adapters, LoRA, DoRA and AdaLoRA (PiSSA, table 3)",
    run,
    draw,
    minutes=25,
)
