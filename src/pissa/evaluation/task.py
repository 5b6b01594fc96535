"""What an evaluation is: problems from a file, a model's samples, one figure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..data.prompts import TEMPLATES, Template
from ..errors import ConfigError
from .intervals import wilson
from .options import EvaluationOptions as EvaluationOptions
from .samples import SampleLog

Progress = Callable[[int, int], None]
"""Called with the number of samples done and in all."""


DEFAULTS = EvaluationOptions()


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a task's problems."""

    metric: str
    """What `value` is, such as "exact_match"."""
    value: float
    """The figure; an accuracy is a share in [0, 1]."""
    interval: tuple[float, float] | None
    """Its 95 % interval over the problems: Wilson's for an accuracy, else a bootstrap; None where there is none."""
    samples: list[dict[str, Any]]
    """One per problem, in the problems' order, each with "index" and "correct" (true or false) or a "score"."""
    higher_is_better: bool = True
    """False for a loss and what derives from it."""
    others: dict[str, float] = field(default_factory=dict)
    """Further metrics of the same samples, by name."""
    notes: tuple[str, ...] = ()
    """What a reader of the figure has to know."""


class Task(ABC):
    """A kind of problem: how it is read, put to a model and scored."""

    name: ClassVar[str]
    metric: ClassVar[str]
    template: ClassVar[Template] = "auto"
    max_new_tokens: ClassVar[int] = 0
    data_format: ClassVar[str]
    """What a row of the data looks like, for messages."""
    settings: ClassVar[tuple[str, ...]] = ("template", "batch_size", "max_new_tokens")
    """The options that this task has a use for, besides `limit`."""

    @property
    def remedy(self) -> str:
        """What its data has to look like."""
        return f"A row of {self.name} is {self.data_format}"

    @property
    def classes(self) -> int | None:
        """Outputs of the sequence-classification model that the task takes besides causal ones; None: it takes none."""
        return None

    def warnings(self) -> tuple[str, ...]:
        """What the user has to know before the work begins."""
        return ()

    def check(self, options: EvaluationOptions) -> None:
        """Refuse options that this task has no use for, before anything is loaded.

        Raises:
            ConfigError: naming them; or there is no such template.
        """
        if options.template is not None and options.template not in TEMPLATES:
            raise ConfigError(f"template is {options.template!r}; allowed: {', '.join(TEMPLATES)}")
        usual = EvaluationOptions()
        used = {"limit", "template", *self.settings}
        idle = [f.name for f in fields(options) if f.name not in used]
        idle = [name for name in idle if getattr(options, name) != getattr(usual, name)]
        if idle:
            raise ConfigError(f"task {self.name} has no use for {', '.join(idle)}; leave that out")

    @abstractmethod
    def load(self, data: str | Path, limit: int | None = None) -> list[Any]:
        """The problems of a local file, the first `limit` of them.

        Raises:
            DataError: no such file, or rows that are not this task's.
        """

    def run(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[Any],
        options: EvaluationOptions = DEFAULTS,
        *,
        log: SampleLog | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Put the problems to a model.

        Args:
            model: a model of transformers, or a PeftModel around one; its mode is left as it was.
            tokenizer: its tokenizer; never changed.
            problems: as `load` gives them.
            options: how to run.
            log: takes every sample as it is made; what it holds already is not made again.
            progress: told how many samples are done.

        Raises:
            ConfigError: see `check`.
        """
        self.check(options)
        return self.measure(model, tokenizer, problems, options, SampleLog() if log is None else log, progress)

    @abstractmethod
    def measure(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[Any],
        options: EvaluationOptions,
        log: SampleLog,
        progress: Progress | None,
    ) -> Evaluation:
        """What `run` gives, once its options are checked and there is a log."""


def accuracy(metric: str, samples: list[dict[str, Any]], notes: tuple[str, ...] = ()) -> Evaluation:
    """The share of correct samples, with Wilson's interval."""
    correct = sum(bool(sample["correct"]) for sample in samples)
    return Evaluation(metric, correct / len(samples), wilson(correct, len(samples)), samples, notes=notes)
