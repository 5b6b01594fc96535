"""Perplexity as a task: of a text, window by window, or of the responses in training data, example by example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...data.conversation import Example
from ...data.read import read_examples
from ...data.text_files import texts_of
from ...errors import ConfigError, DataError
from ..intervals import bootstrap
from ..samples import SampleLog
from ..task import Evaluation, EvaluationOptions, Progress, Task

UNCUT = 1 << 30


class PerplexityTask(Task):
    """exp(mean nats per token). A .txt file is one text, read in windows that do not overlap; of JSON lines or
    parquet, rows of training data, the response tokens count."""

    name = "perplexity"
    metric = "perplexity"
    settings = ("template", "batch_size", "window")
    data_format = "plain text (.txt, .txt.gz), or a row of training data"

    def load(self, data: str | Path, limit: int | None = None) -> list[str] | list[Example]:
        """One text, or the first `limit` examples; of a text, `EvaluationOptions.limit` windows are read."""
        if str(data).lower().endswith((".txt", ".txt.gz")):
            return ["".join(texts_of(data))]
        if not Path(data).exists():
            raise DataError(
                f"there is no file {data}; give a local .txt, .jsonl or .json (each also as .gz) or .parquet"
            )
        return read_examples(Path(data))[:limit]

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[str | Example],
        options: EvaluationOptions,
        log: SampleLog,
        progress: Progress | None,
    ) -> Evaluation:
        """Samples have a "score" in nats per token and its "tokens"."""
        if not problems:
            raise DataError("there is nothing to measure; give a text or at least one example")
        examples = [problem for problem in problems if isinstance(problem, Example)]
        if examples:
            batches, total = _examples(model, tokenizer, examples, options, self.template, log)
        else:
            batches, total = _windows(
                model, tokenizer, "".join(p for p in problems if isinstance(p, str)), options, log
            )
        training = model.training
        model.eval()
        try:
            for batch in batches:
                log.add(batch)
                if progress is not None:
                    progress(len(log), total)
        finally:
            model.train(training)
        samples = log.in_order()
        return Evaluation("perplexity", _value(samples), bootstrap(samples, _value), samples, higher_is_better=False)


def _value(samples: list[dict[str, Any]]) -> float:
    tokens = sum(sample["tokens"] for sample in samples)
    return math.exp(sum(sample["score"] * sample["tokens"] for sample in samples) / tokens)


def _windows(
    model: Any, tokenizer: Any, text: str, options: EvaluationOptions, log: SampleLog
) -> tuple[Iterator[list[dict[str, Any]]], int]:
    from ..perplexity import window_loss, windows_of

    if options.window < 2:
        raise ConfigError(f"window is {options.window!r}; give at least 2 tokens")
    ids = tokenizer(text, verbose=False)["input_ids"]
    spans = list(windows_of(len(ids), options.window, options.window))[: options.limit]
    if not spans:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2")

    def measured() -> Iterator[list[dict[str, Any]]]:
        for index, (start, stop, fresh) in enumerate(spans):
            if index not in log:
                loss = window_loss(model, ids[start:stop], fresh)
                yield [{"index": index, "start": start, "tokens": fresh, "score": loss}]

    return measured(), len(spans)


def _examples(
    model: Any, tokenizer: Any, examples: list[Example], options: EvaluationOptions, template: Any, log: SampleLog
) -> tuple[Iterator[list[dict[str, Any]]], int]:
    from ...data.encode import IGNORED, encode
    from ..loss import held_out_loss

    template = options.template or template
    encoded = encode(examples, tokenizer, template=template, max_length=UNCUT)
    unseen = sum(all(label == IGNORED for label in labels[: options.window]) for labels in encoded.labels)
    if unseen:
        raise DataError(
            f"{unseen} of {len(examples)} rows have a prompt of {options.window} tokens or more, so nothing of their "
            "response is seen; give a larger window"
        )

    def measured() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(examples), options.batch_size):
            chosen = range(start, min(start + options.batch_size, len(examples)))
            if all(index in log for index in chosen):
                continue
            found = held_out_loss(
                model,
                tokenizer,
                [examples[i] for i in chosen],
                template=template,
                max_length=options.window,
                batch_size=options.batch_size,
            )
            yield [
                {"index": i, "where": examples[i].where, "tokens": tokens, "score": nats / tokens}
                for i, nats, tokens in zip(chosen, found.nats, found.tokens, strict=True)
            ]

    return measured(), len(examples)
