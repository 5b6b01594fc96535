"""`train`: one run, from a model and data to a directory that is the result (`directory.py` has its layout).

The same command continues a run that stopped, from its last checkpoint, to the same losses.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.progress import Progress
from transformers import TrainerCallback

from ..checkpoint.disk.write import explained
from ..errors import Interrupted
from .bar import make_progress
from .course import carry_out
from .directory import (
    RunDirectory,
    absolute,
    discard,
    finished_results,
    has_only_other_settings,
    leftovers,
    only_writer,
)
from .engine import is_main_process, training_arguments
from .job import Job
from .preview import Preview, preview
from .ready import ready_split, recipe_of_split
from .recipe import Recipe
from .resume import go_back
from .rows import Rows, digest


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    directory: Path
    """The run's directory."""
    results: dict[str, Any]
    """What results.json holds."""
    model: Any
    """The trained model, in evaluation mode; None where the run was finished before."""


def train(
    model: str,
    data: str | Rows,
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    label: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Fine-tune a model; continue where an earlier run of the same settings stopped.

    Args:
        model: the base's directory or hub id.
        data: a file or hub id, see `read_examples`; or the rows themselves, or examples that were made of them.
        out: the run's directory: new, empty, or that of the same run.
        recipe: all settings.
        label: the run's name on the bar, where it is one of several: what would be said of each is then not said.
        progress: a bar to use; None for one of its own.
        quiet: no bar at all.
        callbacks: called at every step after the run's own; what they do must leave the model as it is.

    Returns:
        The run's directory, its results and the trained model.

    Raises:
        PissaError: the input or the settings are wrong, before anything is written.
        OutputError: `out` holds something else, or cannot be written.
        TrainingError: the run diverged; nothing is published.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.

    Example:
        >>> from pissa import Recipe, train
        >>> recipe = Recipe(rank=8, learning_rate=2e-4, max_steps=2, batch_size=4)
        >>> run = train("base", "rows.jsonl", "run", recipe, quiet=True)
        >>> len(run.results["losses"]), (run.directory / "adapter_model.safetensors").is_file()
        (2, True)
    """
    directory = RunDirectory(Path(out))
    try:
        quieten()
        arguments = training_arguments(recipe, directory.state)
        model = absolute(model)
        ready = ready_split(model)
        if ready is not None:
            recipe = recipe_of_split(ready, recipe)
        settings = {"model": str(model), "data": data if isinstance(data, str) else digest(data), **recipe.as_dict()}
        visible = is_main_process() and not quiet
        bar = progress or make_progress()
        finished = _found(directory, settings, settings.pop("resume_from"))
        if finished is not None:
            if visible:
                bar.console.print(f"{directory.path} is finished already; these are its results", markup=False)
            return RunResult(directory.path, finished, None)
        with nullcontext() if progress is not None or not visible else bar:
            on_bar = bar if visible else None
            job = Job(model, data, directory, recipe, arguments, settings, on_bar, label)
            return RunResult(directory.path, *carry_out(job, callbacks))
    except KeyboardInterrupt:
        raise Interrupted(directory.what_is_saved) from None


def _found(directory: RunDirectory, settings: dict[str, Any], resume_from: str | None) -> dict[str, Any] | None:
    """The results of a run that is finished; otherwise its directory, made ready to begin or to go on."""
    with explained(directory.path):
        if has_only_other_settings(directory, settings):
            # what was interrupted before its first checkpoint saved nothing
            PartialState().wait_for_everyone()
            if is_main_process():
                with only_writer(directory):
                    discard(directory)
            PartialState().wait_for_everyone()
        if resume_from is not None:
            if is_main_process():
                go_back(directory, resume_from, settings)
            PartialState().wait_for_everyone()
        finished = finished_results(directory, settings)
    if finished is not None and is_main_process() and leftovers(directory):
        with only_writer(directory):
            pass
    return finished


def rehearse(
    model: str, data: str | Rows, out: str | os.PathLike[str], recipe: Recipe, *, quiet: bool = False
) -> Preview:
    """What `train` would do and take, with the same checks up to the weights; nothing is written.

    Args:
        model: the base's directory or hub id.
        data: a file or hub id; or the rows themselves.
        out: where the run would be.
        recipe: all settings.
        quiet: no bar at all.

    Raises:
        PissaError: the input or the settings are wrong.
    """
    quieten()
    training_arguments(recipe, RunDirectory(Path(out)).state)
    bar = make_progress()
    with nullcontext() if quiet else bar:
        return preview(absolute(model), data, recipe, None if quiet else bar)


def quieten() -> None:
    """Leave stderr to the bar and to what a user can act on."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
