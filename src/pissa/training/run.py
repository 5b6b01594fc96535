"""`train`: one run, from a model and data to a directory that is the result (`directory.py` has its layout).

The same command continues a run that stopped, from its last checkpoint, to the same losses.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import Progress
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from ..checkpoint.disk.write import explained
from ..checkpoint.residual import save_residual
from ..checkpoint.source.load import check_model_directory
from ..checkpoint.vocabulary import enlarge, rows_of
from ..data.encode import Encoded
from ..data.known_tokens import check_known
from ..data.prompts import resolve_template
from ..errors import ConfigError, Interrupted
from ..live.record import record_of
from ..optimizers.default_rates import SPECTRAL
from ..stages import stage
from .bar import make_progress, shown
from .checkpoints import check_checkpoint
from .checks import check_causal
from .directory import (
    RunDirectory,
    absolute,
    check_same_inputs,
    discard,
    finished_results,
    has_only_other_settings,
    leftovers,
    only_writer,
    read_record,
    write_record,
)
from .engine import DEEPSPEED, FSDP, autocasts, is_launched_with, is_main_process, training_arguments
from .fitting import fitting_batches, polish_batches, what_it_takes
from .outcome import check_finite, publish, results_of, validated
from .prepare import polished, prepare
from .preview import Preview, preview, preview_of
from .progress import StepLog, StopAtStepEnd, read_log
from .rate_adviser import advise, probe_data
from .ready import ready_split, recipe_of_split
from .recipe import AUTO, Recipe
from .resume import go_back, longer, what_follows
from .rows import Rows, digest, fingerprint_of_rows, scored_batches, tokenised
from .usable import refused
from .validation import ValidationLog

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from .trainer import RunTrainer


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
            return _train(model, data, directory, recipe, arguments, settings, on_bar, label, callbacks)
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


def _train(
    model: str,
    data: str | Rows,
    directory: RunDirectory,
    recipe: Recipe,
    arguments: SFTConfig,
    settings: dict[str, Any],
    progress: Progress | None,
    label: str | None,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    check_model_directory(model)
    set_seed(recipe.seed)
    name = label or recipe.method
    with shown(progress, f"{name}, reading the rows"):
        tokenizer, encoded, validation = tokenised(model, data, recipe)
    if progress is not None and label is None:
        with shown(progress, f"{name}, estimating memory"):
            screen = preview_of(model, recipe, encoded, validation, tokenizer).text
        progress.console.print(screen, markup=False, highlight=False, soft_wrap=True)
    checkpoint = directory.last_checkpoint
    check_checkpoint(directory, checkpoint)
    goes_on = longer(directory, settings)
    if progress is not None and checkpoint is not None:
        after = f", beyond the length that it had: {what_follows(recipe.schedule)}" if goes_on is not None else ""
        progress.console.print(f"continuing from {checkpoint}{after}", markup=False, highlight=False, soft_wrap=True)
    kept = _kept(directory, goes_on)

    def batches() -> list[dict[str, Any]] | None:
        if recipe.component == "scored":
            return scored_batches(encoded, recipe, tokenizer.pad_token_id)
        found = fitting_batches(model, recipe, encoded, tokenizer.pad_token_id)
        if recipe.quantization is not None and progress is not None and label is None:
            progress.console.print(what_it_takes(recipe, found), markup=False, highlight=False, soft_wrap=True)
        return found

    def check(base: Any) -> None:
        if recipe.resize_embeddings and len(tokenizer) > (rows_of(base) or len(tokenizer)):
            enlarge(base, len(tokenizer))
        check_known(encoded.input_ids, rows_of(base), tokenizer, model)
        check_causal(base)

    def polish_text() -> list[dict[str, Any]]:
        return polish_batches(model, recipe, encoded, tokenizer.pad_token_id)

    prepared = prepare(model, recipe, directory, arguments.device, progress, name, batches, polish_text, check)
    fingerprints = {**prepared.fingerprints, "data": fingerprint_of_rows(encoded)}
    if validation is not None:
        fingerprints["eval_data"] = fingerprint_of_rows(validation)
    check_same_inputs(directory, fingerprints)
    split = prepared.split if prepared.split is not None else read_record(directory)["split"]
    advice = None
    if recipe.learning_rate == AUTO:
        with shown(progress, f"{name}, learning rate"):
            advice = _advice(directory, prepared.model, encoded, recipe, arguments, tokenizer.pad_token_id)
        arguments.learning_rate = advice["learning_rate"]
        if progress is not None:
            progress.console.print(f"learning rate {advice['learning_rate']:g}, estimated", markup=False)
    # nobody writes before everybody has looked
    PartialState().wait_for_everyone()
    with ExitStack() as held:
        if is_main_process():
            held.enter_context(only_writer(directory, settings, checkpoint))
            advised = {"advice": advice} if advice is not None else {}
            found = {"settings": settings, "fingerprints": fingerprints, "split": split}
            write_record(directory, {**found, **kept, **advised})
            if prepared.unpolished is not None:
                split = polished(prepared, recipe.polish or 0, directory, progress, name)
                write_record(directory, {**found, **kept, **advised, "split": split})
            record = record_of(prepared.model)
            unsaved = record is not None and record.residual is None
            if recipe.quantization is not None and prepared.split is not None and unsaved:
                save_residual(prepared.model, directory.residual, tokenizer=tokenizer)
                directory.polish.unlink(missing_ok=True)
        log = StepLog(directory.log, progress=progress, label=name)
        watching = [log, *([ValidationLog(directory.validation)] if validation is not None else []), *callbacks]
        with shown(progress, f"{name}, preparing the first step"):
            trainer, stop = _trainer(prepared.model, tokenizer, encoded, validation, recipe, arguments, watching)
        log.trainer = trainer
        _run(trainer, stop, checkpoint)
        step = trainer.load_best()
        template = resolve_template(recipe.template, tokenizer)
        trained = trainer.accelerator.unwrap_model(trainer.model).eval()
        whole = trainer.whole_state()
        results = results_of(
            recipe, settings, encoded, template, fingerprints, split, trained, read_log(directory.log), advice
        )
        if validation is not None:
            results |= validated(directory, validation, trainer, step)
        results |= kept
        check_finite(directory, results)
        if is_main_process():
            with shown(progress, f"{name}, writing {directory.path}"):
                publish(directory, trained, whole, tokenizer, recipe, results, step)
    trainer.accelerator.wait_for_everyone()
    return RunResult(directory.path, results, trained)


def _trainer(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    validation: Encoded | None,
    recipe: Recipe,
    arguments: SFTConfig,
    watching: list[TrainerCallback],
) -> tuple[RunTrainer, StopAtStepEnd]:
    """The trainer, and what hears a request to stop."""
    from .trainer import RunTrainer

    stop = StopAtStepEnd()
    early = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping is not None else []
    with refused() if recipe.training else nullcontext():
        trainer = RunTrainer(
            model,
            arguments,
            encoded,
            tokenizer,
            batch_size=recipe.batch_size,
            validation=validation,
            loraplus_ratio=recipe.loraplus_ratio,
            spectral=recipe.optimizer == SPECTRAL,
            keep_best=recipe.keep_best,
            callbacks=[*watching, *early, stop],
        )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(type(callback))
    return trainer, stop


def _run(trainer: RunTrainer, stop: StopAtStepEnd, checkpoint: Path | None) -> None:
    """Train to the last step.

    Raises:
        KeyboardInterrupt: it was asked to stop before that; a checkpoint is saved.
    """
    try:
        with stage("training"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        stop.release()
        trainer.release()
    if stop.requested and not trainer.stopped_early and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def _kept(directory: RunDirectory, goes_on: dict[str, Any] | None) -> dict[str, Any]:
    """What a run's record says of how it came to be, which each start hands on."""
    record = read_record(directory) if directory.record.is_file() else {}
    kept = {name: record[name] for name in ("resumed_from", "continued") if record.get(name)}
    return kept if goes_on is None else {**kept, "continued": [*kept.get("continued", []), goes_on]}


def _advice(
    directory: RunDirectory, model: Any, encoded: Encoded, recipe: Recipe, arguments: SFTConfig, pad_id: int
) -> dict[str, Any]:
    """The learning rate to train with and what it rests on: that of the run's record where it has one.

    Raises:
        ConfigError: the model would be sharded.
        TrainingError: nothing can be estimated.
    """
    if directory.record.is_file() and (kept := read_record(directory).get("advice")) is not None:
        return kept
    if is_launched_with(FSDP) or is_launched_with(DEEPSPEED):
        raise ConfigError(
            "learning_rate auto needs the whole model on one device, before FSDP or DeepSpeed shard it; give a number"
        )
    if next(model.parameters()).device.type != arguments.device.type:
        model.to(arguments.device)
    found = advise(model, probe_data(encoded, recipe, pad_id), recipe, autocast=autocasts(recipe))
    # several processes find the same up to rounding; all use the first one's
    return broadcast_object_list([asdict(found)])[0]


def quieten() -> None:
    """Leave stderr to the bar and to what a user can act on."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
