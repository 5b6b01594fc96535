"""What a study trains when it needs many runs of a language model: base, problems and recipe for each scale.

    quick     a random model of a few thousand parameters: seconds, and nothing to learn from them
    default   the small Llama of `small_lm.py`, adapted to kinds of word problems that it has never seen
    full      SmolLM2-135M-Instruct on GSM8K, or on generated problems where that is not at hand

With `--model` that model takes the place of the base, and learns what SmolLM2 would.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.read import load_base, load_tokenizer
from ...evaluate.loss import held_out_loss
from ...train.encode import Collator, encode
from ...train.recipe import Recipe
from ...train.rows import examples_from_rows
from ...train.sampler import LengthGroupedBatches
from ...train.trainer import response_loss
from ..arithmetic import UNSEEN, make_problems
from ..fit import Fit, fit
from ..models import smollm2
from ..small_lm import small_lm
from .language import RUNS, Row, fine_tune, tiny_model
from .study import Settings, model_name

DATA_SEED = 7
"""Of generated problems; the small model was pretrained on those of another seed."""
KINDS = 18
"""Of generated problems, UNSEEN among them."""
LAST = 10
"""Steps over which a final training loss is averaged; of a run shorter than twice that, its last half."""


@dataclass(frozen=True)
class LanguageTask:
    """A base and what it is to learn."""

    base: str
    """Directory or hub id."""
    name: str
    """Base and data in words."""
    train: list[Row]
    """Rows to learn."""
    held_out: list[Row]
    """Rows to test on."""
    rates: tuple[float, ...]
    """Learning rates worth trying, ascending."""
    steps: int
    """Of a run."""
    batch: int
    """Examples a step."""


def language_task(settings: Settings, *, steps: int | None = None, held_out: int = 64) -> LanguageTask:
    """Base, data and lengths for a scale.

    Args:
        settings: of the study.
        steps: of a run at the default scale; None for 60.
        held_out: rows to test on, at most.

    Raises:
        PissaError: a model or data set cannot be had.
    """
    if settings.scale == "quick":
        base = settings.model or str(tiny_model(settings.out / RUNS / "tiny-llama"))
        rows, test = make_problems(DATA_SEED, 16, 4)
        return LanguageTask(base, "a random model", rows, test, (1e-3, 4e-3), 2, 2)
    if settings.scale == "default" and settings.model is None:
        _, problems = make_problems(DATA_SEED, 0, 600 * KINDS // len(UNSEEN))
        rows = [row for row in problems if not row["seen_template"]]
        name = "a small Llama on kinds of word problems new to it"
        rates = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        return LanguageTask(str(small_lm()), name, rows[held_out:], rows[:held_out], rates, steps or 60, 8)
    base = settings.model or str(smollm2())
    rates = (2e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
    length = settings.pick(quick=2, default=steps or 60, full=200)
    if settings.scale == "full" and settings.has_data_set("gsm8k"):
        rows, test = _gsm8k(settings)
        return LanguageTask(base, f"{model_name(base)} on GSM8K", rows, test[:held_out], rates, length, 16)
    rows, test = make_problems(DATA_SEED, 2000, held_out)
    return LanguageTask(base, f"{model_name(base)} on word problems", rows, test, rates, length, 4)


def _gsm8k(settings: Settings) -> tuple[list[Row], list[Row]]:
    from ...train.data import read_examples

    files = [settings.data_set("gsm8k") / f"{part}.jsonl.gz" for part in ("train", "test")]
    parts = [[{"question": e.messages[0].content, "answer": e.response} for e in read_examples(f)] for f in files]
    return parts[0], parts[1]


def recipe(task: LanguageTask, method: str, rate: float, seed: int, **changes: Any) -> Recipe:
    """One run's settings: fp32, so that nothing but the method differs.

    Args:
        task: gives steps and batch.
        method: as in `Recipe`.
        rate: peak learning rate.
        seed: of initial factors and order.
        changes: other fields of `Recipe`.
    """
    adapts = {} if method == "full" else {"rank": 8}
    chosen = {"dtype": "fp32", "max_length": 256, "epochs": 100_000, "max_steps": task.steps, **adapts, **changes}
    return Recipe(
        method=method,  # pyright: ignore[reportArgumentType]
        learning_rate=rate,
        seed=seed,
        batch_size=task.batch,
        micro_batch_size=min(task.batch, 8),
        save_every=chosen["max_steps"],
        **chosen,
    )


def cell(settings: Settings, task: LanguageTask, chosen: Recipe, **options: Any) -> dict[str, Any]:
    """One run's losses, gradient norms, held-out loss and `final_loss`; see `fine_tune`."""
    found = fine_tune(replace(settings, model=task.base), chosen, task.train, task.held_out, **options)
    return {**found, "final_loss": final_loss(found["losses"])}


def final_loss(losses: Sequence[float]) -> float:
    """Mean training loss of the last steps."""
    return statistics.fmean(losses[-min(LAST, max(len(losses) // 2, 1)) :])


def best_rates(rows: Sequence[Mapping[str, Any]], value: str = "held_out_loss") -> dict[str, float]:
    """Method -> the learning rate with the lowest mean over seeds."""
    means: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        means.setdefault((row["method"], row["rate"]), []).append(row[value])
    best: dict[str, tuple[float, float]] = {}
    for (method, rate), values in means.items():
        best[method] = min(best.get(method, (float("inf"), 0.0)), (statistics.fmean(values), rate))
    return {method: rate for method, (_, rate) in best.items()}


def mean_curve(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The mean of a curve over rows, step by step."""
    return [statistics.fmean(column) for column in zip(*(row[name] for row in rows), strict=True)]


class InMemory:
    """A base and its data held in memory, for studies that build their own adapters or look at a run as it goes."""

    def __init__(self, task: LanguageTask) -> None:
        self.task = task
        self.tokenizer = load_tokenizer(task.base)
        self.base = load_base(task.base, dtype=torch.float32)
        self.encoded = encode(examples_from_rows(task.train), self.tokenizer, template="alpaca", max_length=256)
        self.held_out = examples_from_rows(task.held_out)

    def copy(self) -> Any:
        """The base once more, to be changed, on the device for training."""
        found = copy.deepcopy(self.base)
        return found.cuda() if torch.cuda.is_available() else found

    def loss(self, model: Any) -> float:
        """Mean held-out loss in nats a token."""
        return held_out_loss(model, self.tokenizer, self.held_out, batch_size=16).mean

    def train(self, model: Any, rate: float, seed: int, *, steps: int | None = None, **options: Any) -> Fit:
        """Train what requires a gradient as `train` would: the same loss, order, clipping and schedule."""
        return fit(
            model.train(),
            self._batches(seed),
            _mean_response_loss,
            learning_rate=rate,
            steps=steps or self.task.steps,
            **options,
        )

    def _batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        order = LengthGroupedBatches(self.encoded.lengths, self.task.batch, seed)
        collate = Collator(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)
        for epoch in itertools.count():
            order.set_epoch(epoch)
            rows = iter(order)
            while places := list(itertools.islice(rows, self.task.batch)):
                yield dict(collate([self.encoded[place] for place in places]))


def _mean_response_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    total, count = response_loss(model, model.get_output_embeddings(), batch)
    return total / max(count, 1)
