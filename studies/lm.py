"""What a study trains when it needs many runs of a language model: base, problems and recipe for each scale.

    quick     a random model of a few thousand parameters: seconds, and nothing to learn from them
    default   the small Llama of `small_lm.py`, which learns kinds of problems that it has seen little of
    full      SmolLM2-135M-Instruct on GSM8K, or on generated problems where that is not at hand

With `--model` that model takes the place of the base, and learns what SmolLM2 would. Learning rates are looked for on
the validation rows (`search.py`); the held-out ones are for the verdict alone.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.data.encode import Collator, encode
from pissa.data.rows import examples_from_rows
from pissa.evaluation.loss import held_out_loss
from pissa.evaluation.tasks.registry import EvaluationOptions, find_task
from pissa.lab.demo.arithmetic import make_problems
from pissa.lab.models import smollm2
from pissa.training.recipe import Recipe
from pissa.training.sampler import LengthGroupedBatches

from .fit import Fit, fit, on_device
from .language import RUNS, Row, fine_tune, response_mean, tiny_model
from .search import Search, search_rates
from .small_lm import problems, small_lm
from .study import Settings, model_name

DATA_SEED = 7
"""The seed of the problems that are generated for larger models."""
TUNED = "lora, its own rate"
"""LoRA at the learning rate that was found for it, where "lora" has PiSSA's, as in the paper's comparisons."""
VALIDATION = 64
"""Rows that learning rates are looked for on."""
SMALL_RATES = (1e-3, 2e-3, 4e-3)
RATES = (2e-4, 4e-4, 8e-4)
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
    validation: list[Row]
    """Rows to choose settings by."""
    held_out: list[Row]
    """Rows to test on."""
    rates: tuple[float, ...]
    """Learning rates of an adapter at which a search begins, ascending by one factor."""
    steps: int
    """How many steps a run takes."""
    batch: int
    """Examples a step."""
    answer_tokens: int
    """Tokens that a solution may have."""

    @property
    def to_choose(self) -> LanguageTask:
        """The same, tested on the validation rows."""
        return replace(self, held_out=self.validation)

    @property
    def full_rates(self) -> tuple[float, ...]:
        """Where a search begins for full fine-tuning, which takes smaller steps."""
        return tuple(rate / 4 for rate in self.rates)


def language_task(settings: Settings, *, steps: int | None = None, held_out: int = 128) -> LanguageTask:
    """Base, data and lengths for a scale.

    Args:
        settings: of the study.
        steps: of a run at the default scale; None for 100.
        held_out: rows to test on, at most.

    Raises:
        PissaError: a model or data set cannot be had.
    """
    if settings.scale == "quick":
        base = settings.model or str(tiny_model(settings.out / RUNS / "tiny-llama"))
        rows, test = make_problems(DATA_SEED, 16, 4)
        return LanguageTask(base, "a random model", rows, rows[:4], test, (1e-3, 4e-3), 2, 2, 4)
    if settings.scale == "default" and settings.model is None:
        return small_task(str(small_lm(progress=settings.progress)), steps or 100, held_out)
    base = settings.model or str(smollm2())
    length = settings.pick(quick=2, default=steps or 100, full=200)
    if settings.scale == "full" and settings.has_data_set("gsm8k"):
        rows, test = _gsm8k(settings)
        parts = rows[VALIDATION:], rows[:VALIDATION], test[:held_out]
        return LanguageTask(base, f"{model_name(base)} on GSM8K", *parts, RATES, length, 16, 256)
    rows = make_problems(DATA_SEED, 2000 + VALIDATION + held_out, 0)[0]
    name = f"{model_name(base)} on word problems"
    return LanguageTask(base, name, *_parts(rows, held_out), RATES, length, 4, 64)


def small_task(base: str, steps: int, held_out: int = 128) -> LanguageTask:
    """What the default scale has a small model learn.

    Args:
        base: its directory.
        steps: of a run.
        held_out: rows to test on.
    """
    name = "a small Llama learning rare kinds of word problems"
    return LanguageTask(base, name, *_parts(problems()[1], held_out), SMALL_RATES, steps, 8, 64)


def _parts(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to learn, to choose by, and to test on."""
    return rows[held_out + VALIDATION :], rows[held_out : held_out + VALIDATION], rows[:held_out]


def _gsm8k(settings: Settings) -> tuple[list[Row], list[Row]]:
    from pissa.data.read import read_examples

    files = [settings.data_set("gsm8k") / f"{part}.jsonl.gz" for part in ("train", "test")]
    parts = [[{"question": e.messages[0].content, "answer": e.response} for e in read_examples(f)] for f in files]
    return parts[0], parts[1]


def recipe(task: LanguageTask, method: str, rate: float, seed: int, **changes: Any) -> Recipe:
    """One run's settings: fp32, so that nothing but the method differs.

    Args:
        task: gives steps and batch.
        method: as in `Recipe`, or TUNED; qpissa is the published one, with five iterations.
        rate: peak learning rate.
        seed: of initial factors and order.
        changes: other fields of `Recipe`.
    """
    adapts: dict[str, Any] = {} if method == "full" else {"rank": 8}
    if method == "qpissa":
        method, adapts = "pissa", {**adapts, "quantize": "nf4", "quantize_method": "qpissa-5"}
    chosen = {
        "dtype": "fp32",
        "max_length": 256,
        "max_cut_share": 1.0,
        "epochs": 100_000,
        "max_steps": task.steps,
        **adapts,
        **changes,
    }
    return Recipe(
        method="lora" if method == TUNED else method,  # pyright: ignore[reportArgumentType]
        learning_rate=rate,
        seed=seed,
        batch_size=task.batch,
        micro_batch_size=min(task.batch, 8),
        save_every=chosen["max_steps"],
        **chosen,
    )


def cell(settings: Settings, task: LanguageTask, chosen: Recipe, *, solved: bool = False) -> dict[str, Any]:
    """One run's losses, gradient norms, held-out loss and `final_loss`; see `fine_tune`.

    Args:
        settings: of the study.
        task: what is trained.
        chosen: the run's recipe.
        solved: add the share of held-out problems that the trained model solves.
    """

    def also(model: Any, tokenizer: Any) -> dict[str, float]:
        return {"solved": share_solved(model, tokenizer, task)} if solved else {}

    found = fine_tune(replace(settings, model=task.base), chosen, task.train, task.held_out, also=also)
    return {**found, "final_loss": final_loss(found["losses"])}


def final_loss(losses: Sequence[float]) -> float:
    """Mean training loss of the last steps."""
    return statistics.fmean(losses[-min(LAST, max(len(losses) // 2, 1)) :])


def share_solved(model: Any, tokenizer: Any, task: LanguageTask) -> float:
    """The share of held-out problems whose generated solution states the right answer, as task gsm8k has it."""
    options = EvaluationOptions(max_new_tokens=task.answer_tokens, batch_size=32)
    return find_task("gsm8k").run(model, tokenizer, examples_from_rows(task.held_out), options).value


def find_rates(
    settings: Settings,
    study: str,
    task: LanguageTask,
    methods: Sequence[str],
    measure: Callable[..., dict[str, Any]],
    value: str | Callable[[Mapping[str, Any]], float] = "held_out_loss",
    **about: Any,
) -> Search:
    """The learning rate of every method on the validation rows; see `search_rates`.

    Args:
        settings: of the study.
        study: its name.
        task: what is trained.
        methods: as `measure` knows them; "full" begins at lower rates.
        measure: called with the task to test on, `method`, `rate`, `seed` and what `about` holds; returns a cell's
            values.
        value: what to minimise.
        about: what decides a result beside method, rate, seed, task and steps.
    """

    def chosen(method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        return measure(task.to_choose, method=method, rate=rate, seed=seed, **about)

    rates = {method: task.full_rates if method == "full" else task.rates for method in methods}
    return search_rates(settings, study, rates, chosen, value, task=task.name, steps=task.steps, **about)


class InMemory:
    """A base and its data held in memory, for studies that build their own adapters or look at a run as it goes."""

    def __init__(self, task: LanguageTask) -> None:
        self.task = task
        self.tokenizer = load_tokenizer(task.base)
        self.base = load_base(task.base, dtype=torch.float32)
        self.encoded = encode(examples_from_rows(task.train), self.tokenizer, template="alpaca", max_length=256)
        self.held_out = examples_from_rows(task.held_out)

    def on(self, task: LanguageTask) -> InMemory:
        """The same base and training rows, tested on another task's rows."""
        found = copy.copy(self)
        found.task, found.held_out = task, examples_from_rows(task.held_out)
        return found

    def copy(self) -> Any:
        """The base once more, to be changed, on the device for training."""
        found = copy.deepcopy(self.base)
        return found.cuda() if torch.cuda.is_available() else found

    def loss(self, model: Any) -> float:
        """Mean held-out loss in nats a token."""
        return held_out_loss(model, self.tokenizer, self.held_out, batch_size=16).mean

    def solved(self, model: Any) -> float:
        """The share of held-out problems solved."""
        return share_solved(model, self.tokenizer, self.task)

    def first_loss(self, model: Any) -> Tensor:
        """The loss of the first batch, in the order of seed 0."""
        return response_mean(model, on_device(next(self.batches(0)), model.device))

    def train(self, model: Any, rate: float, seed: int, *, steps: int | None = None, **options: Any) -> Fit:
        """Train what requires a gradient as `train` would: the same loss, order, clipping and schedule."""
        return fit(
            model.train(),
            self.batches(seed),
            response_mean,
            learning_rate=rate,
            steps=steps or self.task.steps,
            **options,
        )

    def batches(self, seed: int, size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches for ever, of the task's size where no other is given."""
        size = size or self.task.batch
        order = LengthGroupedBatches(self.encoded.lengths, size, seed)
        collate = Collator(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)
        for epoch in itertools.count():
            order.set_epoch(epoch)
            rows = iter(order)
            while places := list(itertools.islice(rows, size)):
                yield dict(collate([self.encoded[place] for place in places]))
