"""One run of a comparison: trained by `pissa.training.run.train`, scored, recorded, its weights removed.

The run's directory is the ordinary one of a run, with trial.json beside results.json, written when all is measured.
A run that diverged is a result too: it has a trial.json that says so, and the losses up to there.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from ...checkpoint.disk.write import write_json
from ...checkpoint.source.load import load_base
from ...errors import TrainingError
from ...training.directory import RunDirectory
from ...training.engine import storage_dtype, training_arguments
from ...training.prepare import prepare
from ...training.progress import read_log
from ...training.recipe import Recipe
from ...training.run import RunResult, train
from ..memory import peak_gib, start_peak
from .score import Scorer
from .watch import Watch, curve_of, curve_steps, finite, seconds_of

TRIAL = "trial.json"
KEPT = (TRIAL, "results.json", "state/run.json", "state/log.jsonl", "state/watch.jsonl")
"""What is left of a run whose weights are not kept."""


@dataclass(frozen=True)
class Trial:
    """One run to be made."""

    directory: Path
    """Its own."""
    purpose: Literal["search", "run", "null"]
    """What it is for: a search's trial is scored on the validation rows alone."""
    recipe: Recipe
    """All of its settings."""
    rung: int | None = None
    """The rung of the search to which it belongs; None for a run that is reported."""

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        place = f"rung {self.rung}" if self.rung is not None else f"seed {self.recipe.seed}"
        return f"{self.recipe.method} lr {self.recipe.learning_rate:g}, {place}"


def run_trial(
    trial: Trial,
    model: str,
    scorer: Scorer,
    *,
    curve_points: int = 0,
    keep: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, score and record; what an earlier call left half-done is continued.

    Args:
        trial: the run.
        model: the base's directory or hub id.
        scorer: what is measured, and the rows.
        curve_points: how often the test loss is measured while it trains.
        keep: leave weights and checkpoints where they are.
        progress: a bar to use.

    Returns:
        What trial.json holds.

    Raises:
        PissaError: as `train`, but for a run that diverged.
    """
    clock = time.perf_counter()
    directory = RunDirectory(trial.directory)
    steps = trial.recipe.max_steps or 0
    watch_path = directory.state / "watch.jsonl"
    watch = Watch(watch_path, curve_steps(steps, curve_points), scorer.curve)
    from_here = start_peak()
    try:
        result = train(
            model,
            scorer.task.train,
            trial.directory,
            trial.recipe,
            label=trial.label,
            progress=progress,
            quiet=progress is None,
            callbacks=[watch],
        )
    except TrainingError as error:
        found = _diverged(directory, str(error))
    else:
        measured = {"peak_memory_gib": peak_gib() if from_here else None, **_of_results(result.results)}
        found = {**measured, **_scores(trial, result, model, scorer)}
    record = {
        "purpose": trial.purpose,
        "method": trial.recipe.method,
        "learning_rate": trial.recipe.learning_rate,
        "seed": trial.recipe.seed,
        "rung": trial.rung,
        "steps": steps,
        **found,
        "during": curve_of(watch_path),
        "seconds": seconds_of(watch_path),
        "seconds_in_all": time.perf_counter() - clock,
    }
    write_json(trial.directory / TRIAL, record)
    if not keep:
        trim(trial.directory)
    return record


def trim(directory: Path) -> None:
    """Remove what is not needed any more once a run is recorded: weights, checkpoints, and what describes them."""
    kept = {directory / name for name in KEPT}
    for child in [*directory.iterdir(), *(directory / "state").iterdir()]:
        if child in kept or child == directory / "state":
            continue
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def _diverged(directory: RunDirectory, message: str) -> dict[str, Any]:
    log = read_log(directory.log)
    return {
        "status": "diverged",
        "message": message,
        "losses": [record["loss"] for record in log],
        "grad_norms": [record["grad_norm"] for record in log],
        "validation_loss": None,
    }


def _of_results(results: dict[str, Any]) -> dict[str, Any]:
    """What the run itself found."""
    names = ("losses", "grad_norms", "init_seconds", "trainable_parameters", "tokens_per_second")
    gaps = {name: results.get(name) for name in ("mean_quantization_gap", "largest_quantization_gap")}
    quantized = results.get("quantization") is not None
    return {**{name: results[name] for name in names}, "quantization_error": gaps if quantized else None}


def _scores(trial: Trial, result: RunResult, source: str, scorer: Scorer) -> dict[str, Any]:
    """Losses on validation rows, and, for a run that is reported, everything on test problems."""
    model = result.model if result.model is not None else _trained(trial, source)
    validation = scorer.validation_loss(model)
    if not math.isfinite(validation):
        return {"status": "diverged", "message": "the validation loss is not finite", "validation_loss": None}
    done: dict[str, Any] = {"status": "done", "validation_loss": validation}
    if trial.purpose == "search":
        return done
    test = scorer.test(model)
    if not all(math.isfinite(loss) for loss in test["test_losses"]):
        return {"status": "diverged", "message": "the test loss is not finite", "validation_loss": None}
    perplexity = test.pop("perplexity")
    return {**done, **test, "perplexity_after": finite(perplexity) if perplexity is not None else None}


def _trained(trial: Trial, source: str) -> Any:
    """The model of a run that was finished before and not yet scored."""
    device = training_arguments(trial.recipe, trial.directory / "state").device
    if not trial.recipe.adapts:
        model = load_base(trial.directory, dtype=storage_dtype(trial.recipe))
    else:
        model = prepare(source, trial.recipe, RunDirectory(trial.directory), device, None, trial.label).model
    return model.to(device).eval()
