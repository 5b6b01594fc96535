"""GLUE's tasks for `pissa eval`: a sequence-classification model by its head, a causal one by its likeliest answer.

Data is GLUE's own .tsv of a task's labelled split (dev.tsv, also as .gz), or JSON lines with the columns that the data
set has on the hub. Prompts and answers of a causal model are lm-eval's, which also computes the likelihoods.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.conversation import RowError
from ...data.read import file_rows
from ...data.rows import unusable_rows
from ...errors import ConfigError, DataError
from ..harness import likelihoods
from ..intervals import bootstrap, wilson
from ..metrics import METRICS, check_metrics
from ..samples import SampleLog
from ..task import Evaluation, EvaluationOptions, Progress, Task
from .glue_tasks import GLUE_TASKS

CHUNK = 256
"""Rows whose answers' likelihoods are computed, and kept, at a time."""
MEANING: dict[str, tuple[str, ...]] = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
"""Classes that GLUE's files spell out, in the order of their numbers."""


@dataclass(frozen=True)
class GlueRow:
    """One example."""

    texts: tuple[str, ...]
    label: float
    where: str


class Understanding(Task):
    """One task of GLUE.

    Args:
        kind: its name on the hub: sst2, mrpc, stsb and so on.

    Raises:
        ConfigError: there is none of this name.
    """

    settings: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __init__(self, kind: str) -> None:
        if kind not in GLUE_TASKS:
            raise ConfigError(
                f"no task is called 'glue/{kind}'; allowed: {', '.join(f'glue/{name}' for name in GLUE_TASKS)}"
            )
        self.kind, self.short = GLUE_TASKS[kind], kind
        self.name, self.metric = f"glue/{kind}", self.kind.metrics[0]  # type: ignore[misc]
        self.data_format = f"{kind}'s {', '.join((*self.kind.texts, 'label'))}"  # type: ignore[misc]

    @property
    def classes(self) -> int:
        """How many; 1 for a value."""
        return max(len(self.kind.answers), 1)

    def load(self, data: str | Path, limit: int | None = None) -> list[GlueRow]:
        """Rows with their labels.

        Raises:
            DataError: no such file, rows of another task, or labels that are missing, as in GLUE's test files.
        """
        path = Path(data)
        if not path.is_file():
            raise DataError(f"there is no file {data}; give GLUE's .tsv (also as .gz) or the hub's rows as .jsonl")
        tsv = path.name.lower().endswith((".tsv", ".tsv.gz"))
        rows: list[GlueRow] = []
        offenders: list[str] = []
        for where, row in _tsv_rows(path, self.short) if tsv else file_rows(path):
            if len(rows) == limit:
                break
            try:
                rows.append(self._row(row, where, own=tsv))
            except RowError as reason:
                offenders.append(f"{where} {reason}")
        if offenders:
            total = len(rows) + len(offenders)
            raise unusable_rows(str(data), offenders, total, self.remedy)
        if not rows:
            raise DataError(f"{data} holds no rows. {self.remedy}")
        return rows

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[GlueRow],
        options: EvaluationOptions,
        log: SampleLog,
        progress: Progress | None,
    ) -> Evaluation:
        """Predict and score."""
        check_metrics()
        by_head = is_classifier(model)
        if not by_head and not self.kind.answers:
            raise ConfigError(f"{self.name} asks for a value; give a sequence-classification model with one output")
        chunk = options.batch_size if by_head else max(CHUNK, options.batch_size)
        for start in range(0, len(problems), chunk):
            places = range(start, min(start + chunk, len(problems)))
            if all(index in log for index in places):
                continue
            rows = [problems[index] for index in places]
            found = self._by_head(model, tokenizer, rows) if by_head else self._asked(model, tokenizer, rows, options)
            log.add(self._sample(i, row, *pair) for i, row, pair in zip(places, rows, found, strict=True))
            if progress is not None:
                progress(len(log), len(problems))
        return self._evaluation(log.in_order())

    def _row(self, row: Any, where: str, *, own: bool) -> GlueRow:
        if isinstance(row, RowError):
            raise row
        *texts, label = self.kind.columns if own and self.kind.columns else (*self.kind.texts, "label")
        missing = [name for name in (*texts, label) if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            raise RowError(f"has no {', '.join(missing)}")
        return GlueRow(tuple(str(row[name]) for name in texts), self._label(row[label]), where)

    def _label(self, given: Any) -> float:
        names = MEANING.get(self.short, ())
        if given in names:
            return float(names.index(given))
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = math.nan
        regressed = not self.kind.answers
        if not (0 <= value <= 5 if regressed else value in range(self.classes)):
            allowed = "0 to 5" if regressed else ", ".join((*map(str, range(self.classes)), *names))
            raise RowError(f"has label {given!r}; allowed: {allowed}")
        return value

    def _by_head(self, model: Any, tokenizer: Any, rows: Sequence[GlueRow]) -> Iterator[tuple[float, list[float]]]:
        import torch

        found = len(model.config.id2label)
        if found != self.classes:
            raise ConfigError(f"{self.name} needs {self.classes} outputs; the model's head has {found}")
        longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
        columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
        batch = tokenizer(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = model(**batch.to(model.device)).logits.float().cpu()
        finally:
            model.train(training)
        for row in logits.tolist():
            yield (row[0] if self.classes == 1 else float(row.index(max(row)))), row

    def _asked(
        self, model: Any, tokenizer: Any, rows: Sequence[GlueRow], options: EvaluationOptions
    ) -> Iterator[tuple[float, list[float]]]:
        texts = [self.question(row) for row in rows]
        for row in likelihoods(model, tokenizer, texts, self.kind.answers, batch_size=options.batch_size):
            yield float(row.index(max(row))), row

    def question(self, row: GlueRow) -> str:
        """What a causal model is asked about a row."""
        texts = list(row.texts)
        if self.short == "mnli":
            texts[1] = texts[1].strip().removesuffix(".") + "."
        return self.kind.prompt.format(*texts)

    def _sample(self, index: int, row: GlueRow, predicted: float, outputs: list[float]) -> dict[str, Any]:
        facts = {"index": index, "where": row.where, "texts": list(row.texts), "label": row.label}
        facts |= {"predicted": predicted, "outputs": outputs}
        if self.kind.answers:
            return {**facts, "correct": predicted == row.label}
        return {**facts, "score": -abs(predicted - row.label)}

    def _evaluation(self, samples: list[dict[str, Any]]) -> Evaluation:
        def figure(name: str, rows: Sequence[dict[str, Any]]) -> float:
            return METRICS[name]([row["predicted"] for row in rows], [row["label"] for row in rows])

        value = figure(self.metric, samples)
        if self.metric == "accuracy":
            interval = wilson(round(value * len(samples)), len(samples))
        else:
            interval = bootstrap(samples, lambda rows: figure(self.metric, rows))
        others = {name: figure(name, samples) for name in self.kind.metrics[1:]}
        return Evaluation(self.metric, value, interval, samples, others=others)


def is_classifier(model: Any) -> bool:
    """Whether a model has a head that classifies sequences, rather than one that predicts tokens."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith("ForSequenceClassification")


def _tsv_rows(path: Path, kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of GLUE's own files; CoLA's have no header, so their columns go by number."""
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            names = ["0", "1", "2", "3"] if kind == "cola" else None
            reader = csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
