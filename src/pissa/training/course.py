"""The course of one run: rows, the model, its steps, its result.

What is written is written by one process, and only after all of them have looked at what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from ..checkpoint.residual import save_residual
from ..checkpoint.source.load import check_model_directory
from ..checkpoint.vocabulary import enlarge, rows_of
from ..data.known_tokens import check_known
from ..data.prompts import resolve_template
from ..errors import ConfigError
from ..live.record import record_of
from ..optimizers.default_rates import SPECTRAL
from ..stages import stage
from .checkpoints import check_checkpoint
from .checks import check_causal
from .directory import check_same_inputs, only_writer, read_record, write_record
from .engine import DEEPSPEED, FSDP, autocasts, is_launched_with, is_main_process
from .fitting import fitting_batches, polish_batches, what_it_takes
from .job import Job, Learned
from .outcome import check_finite, publish, results_of, validated
from .prepare import Prepared, polished, prepare
from .preview import preview_of
from .progress import StepLog, StopAtStepEnd, read_log
from .rate_adviser import advise, probe_data
from .recipe import AUTO
from .resume import longer, what_follows
from .rows import scored_batches, tokenised
from .usable import refused
from .validation import ValidationLog

if TYPE_CHECKING:
    from .trainer import RunTrainer


def carry_out(job: Job, callbacks: Sequence[TrainerCallback]) -> tuple[dict[str, Any], Any]:
    """Train to the end and publish the result.

    Args:
        job: the run, whose directory is free for it.
        callbacks: called at every step after the run's own.

    Returns:
        What results.json holds, and the trained model in evaluation mode.

    Raises:
        PissaError: see `train`.
        KeyboardInterrupt: the run was asked to stop; what was done is saved.
    """
    check_model_directory(job.model)
    set_seed(job.recipe.seed)
    with job.shown("reading the rows"):
        learned = Learned(*tokenised(job.model, job.data, job.recipe))
    kept = _before(job, learned)
    prepared = _prepared(job, learned)
    fingerprints = {**prepared.fingerprints, **learned.fingerprints}
    check_same_inputs(job.directory, fingerprints)
    found = {
        "settings": job.settings,
        "fingerprints": fingerprints,
        "split": prepared.split if prepared.split is not None else read_record(job.directory)["split"],
    }
    advice = _advised(job, learned, prepared.model)
    advised = {} if advice is None else {"advice": advice}
    checkpoint = job.directory.last_checkpoint
    # nobody writes before everybody has looked
    PartialState().wait_for_everyone()
    with ExitStack() as held:
        if is_main_process():
            held.enter_context(only_writer(job.directory, job.settings, checkpoint))
            found["split"] = _begin(job, learned, prepared, {**found, **kept, **advised})
        trainer = _trained(job, learned, prepared.model, callbacks, checkpoint)
        results, trained = _publish(job, learned, trainer, found, kept, advice)
    trainer.accelerator.wait_for_everyone()
    return results, trained


def _before(job: Job, learned: Learned) -> dict[str, Any]:
    """Say what the run will do, and from where it goes on; what its record has of how it came to be."""
    directory, recipe = job.directory, job.recipe
    if job.progress is not None and job.label is None:
        with job.shown("estimating memory"):
            screen = preview_of(job.model, recipe, learned.rows, learned.validation, learned.tokenizer)
        job.say(screen.text)
    checkpoint = directory.last_checkpoint
    check_checkpoint(directory, checkpoint)
    goes_on = longer(directory, job.settings)
    if checkpoint is not None:
        after = f", beyond the length that it had: {what_follows(recipe.schedule)}" if goes_on is not None else ""
        job.say(f"continuing from {checkpoint}{after}")
    record = read_record(directory) if directory.record.is_file() else {}
    kept = {name: record[name] for name in ("resumed_from", "continued") if record.get(name)}
    return kept if goes_on is None else {**kept, "continued": [*kept.get("continued", []), goes_on]}


def _prepared(job: Job, learned: Learned) -> Prepared:
    """The model that is trained, from a base that can learn the rows."""
    recipe, tokenizer, rows = job.recipe, learned.tokenizer, learned.rows

    def batches() -> list[dict[str, Any]] | None:
        if recipe.component == "scored":
            return scored_batches(rows, recipe, tokenizer.pad_token_id)
        found = fitting_batches(job.model, recipe, rows, tokenizer.pad_token_id)
        if recipe.quantization is not None and job.label is None:
            job.say(what_it_takes(recipe, found))
        return found

    def check(base: Any) -> None:
        if recipe.resize_embeddings and len(tokenizer) > (rows_of(base) or len(tokenizer)):
            enlarge(base, len(tokenizer))
        check_known(rows.input_ids, rows_of(base), tokenizer, job.model)
        check_causal(base)

    def polish_text() -> list[dict[str, Any]]:
        return polish_batches(job.model, recipe, rows, tokenizer.pad_token_id)

    shown_as = (job.progress, job.name)
    return prepare(job.model, recipe, job.directory, job.arguments.device, *shown_as, batches, polish_text, check)


def _advised(job: Job, learned: Learned, model: Any) -> dict[str, Any] | None:
    """What the learning rate rests on where it is estimated; it is then that of the run.

    Raises:
        ConfigError: the model would be sharded.
        TrainingError: nothing can be estimated.
    """
    if job.recipe.learning_rate != AUTO:
        return None
    with job.shown("learning rate"):
        advice = _advice(job, learned, model)
    job.arguments.learning_rate = advice["learning_rate"]
    job.say(f"learning rate {advice['learning_rate']:g}, estimated")
    return advice


def _advice(job: Job, learned: Learned, model: Any) -> dict[str, Any]:
    """The learning rate to train with and what it rests on: that of the run's record where it has one."""
    directory, recipe = job.directory, job.recipe
    if directory.record.is_file() and (kept := read_record(directory).get("advice")) is not None:
        return kept
    if is_launched_with(FSDP) or is_launched_with(DEEPSPEED):
        raise ConfigError(
            "learning_rate auto needs the whole model on one device, before FSDP or DeepSpeed shard it; give a number"
        )
    device = job.arguments.device
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    data = probe_data(learned.rows, recipe, learned.tokenizer.pad_token_id)
    found = advise(model, data, recipe, autocast=autocasts(recipe))
    # several processes find the same up to rounding; all use the first one's
    return broadcast_object_list([asdict(found)])[0]


def _begin(job: Job, learned: Learned, prepared: Prepared, record: dict[str, Any]) -> dict[str, float | None]:
    """Write the run's record, and a quantised residual unless it is saved already; what the split cost in the end."""
    directory, split = job.directory, record["split"]
    write_record(directory, record)
    if prepared.unpolished is not None:
        split = polished(prepared, job.recipe.polish or 0, directory, job.progress, job.name)
        write_record(directory, {**record, "split": split})
    live = record_of(prepared.model)
    unsaved = live is not None and live.residual is None
    if job.recipe.quantization is not None and prepared.split is not None and unsaved:
        save_residual(prepared.model, directory.residual, tokenizer=learned.tokenizer)
        directory.polish.unlink(missing_ok=True)
    return split


def _trained(
    job: Job, learned: Learned, model: Any, callbacks: Sequence[TrainerCallback], checkpoint: Path | None
) -> RunTrainer:
    """The trainer after the last step.

    Raises:
        KeyboardInterrupt: it was asked to stop before that; a checkpoint is saved.
    """
    log = StepLog(job.directory.log, progress=job.progress, label=job.name)
    measured = [ValidationLog(job.directory.validation)] if learned.validation is not None else []
    with job.shown("preparing the first step"):
        trainer, stop = _trainer(job, learned, model, [log, *measured, *callbacks])
    log.trainer = trainer
    try:
        with stage("training"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        stop.release()
        trainer.release()
    if stop.requested and not trainer.stopped_early and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    return trainer


def _trainer(
    job: Job, learned: Learned, model: Any, watching: list[TrainerCallback]
) -> tuple[RunTrainer, StopAtStepEnd]:
    """The trainer, and what hears a request to stop."""
    from .trainer import RunTrainer

    recipe, stop = job.recipe, StopAtStepEnd()
    early = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping is not None else []
    with refused() if recipe.training else nullcontext():
        trainer = RunTrainer(
            model,
            job.arguments,
            learned.rows,
            learned.tokenizer,
            batch_size=recipe.batch_size,
            validation=learned.validation,
            loraplus_ratio=recipe.loraplus_ratio,
            spectral=recipe.optimizer == SPECTRAL,
            keep_best=recipe.keep_best,
            callbacks=[*watching, *early, stop],
        )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(type(callback))
    return trainer, stop


def _publish(
    job: Job,
    learned: Learned,
    trainer: RunTrainer,
    found: dict[str, Any],
    kept: dict[str, Any],
    advice: dict[str, Any] | None,
) -> tuple[dict[str, Any], Any]:
    """The results, and the model at the step that is kept; both are written."""
    directory, recipe, tokenizer = job.directory, job.recipe, learned.tokenizer
    step = trainer.load_best()
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    whole = trainer.whole_state()
    template = resolve_template(recipe.template, tokenizer)
    log = read_log(directory.log)
    results = results_of(recipe, learned.rows, template, model=trained, log=log, advice=advice, **found)
    if learned.validation is not None:
        results |= validated(directory, learned.validation, trainer, step)
    results |= kept
    check_finite(directory, results)
    if is_main_process():
        with job.shown(f"writing {directory.path}"):
            publish(directory, trained, whole, tokenizer, recipe, results, step)
    return results, trained
