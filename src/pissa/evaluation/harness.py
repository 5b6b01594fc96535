"""lm-eval (lm-evaluation-harness) on a live model: tasks as YAML over local JSON lines, nothing from any network."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ..errors import extra

NAME = "pissa_local"


def run_harness(
    model: Any, tokenizer: Any, docs: Sequence[Mapping[str, Any]], task: Mapping[str, Any], *, batch_size: int
) -> dict[str, Any]:
    """Let lm-eval evaluate a model on rows of data.

    Args:
        model: a causal language model of transformers, or a PeftModel around one; its mode is left as it was.
        tokenizer: its tokenizer.
        docs: the rows.
        task: what lm-eval's YAML says of the task beside its name and data: output_type, doc_to_text and so on.
        batch_size: requests at once.

    Returns:
        lm-eval's results: "results" by metric, and "samples", one per row in order.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    models = _lm_eval("lm_eval.models.huggingface")
    training = model.training
    try:
        with _quiet():
            live = models.HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)
            return run_task(live, docs, task)
    finally:
        model.train(training)


def run_task(live: Any, docs: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> dict[str, Any]:
    """As `run_harness`, for any model that lm-eval knows (`lm_eval.api.model.LM`)."""
    lm_eval = _lm_eval("lm_eval")
    tasks = _lm_eval("lm_eval.tasks")
    with tempfile.TemporaryDirectory(prefix="pissa-lm-eval-") as place:
        directory = Path(place)
        data = directory / "docs.jsonl"
        data.write_text("".join(json.dumps(dict(doc)) + "\n" for doc in docs), encoding="utf-8")
        local = {
            "task": NAME,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
            "test_split": "test",
            "num_fewshot": 0,
            **task,
        }
        (directory / f"{NAME}.yaml").write_text(yaml.safe_dump(local), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model=live,
            tasks=[NAME],
            task_manager=tasks.TaskManager(include_path=str(directory), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    return {"results": found["results"][NAME], "samples": samples}


def likelihoods(
    model: Any, tokenizer: Any, texts: Sequence[str], answers: Sequence[str], *, batch_size: int
) -> Iterator[list[float]]:
    """ln p(answer | text) of every answer, for each text, as lm-eval computes them.

    Args:
        texts: what the model is asked.
        answers: what may follow after a space, the same for every text.
    """
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": 0,
        "doc_to_choice": list(answers),
        "metric_list": [{"metric": "acc"}],
    }
    docs = [{"text": text} for text in texts]
    for sample in run_harness(model, tokenizer, docs, task, batch_size=batch_size)["samples"]:
        yield [float(response[0]) for response in sample["filtered_resps"]]


def _lm_eval(module: str) -> Any:
    with extra("eval", "this task is lm-eval's"):
        return import_module(module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' reports and bars."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("lm_eval", "lm-eval")}
    bar = is_progress_bar_enabled()
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if bar:
            enable_progress_bar()
