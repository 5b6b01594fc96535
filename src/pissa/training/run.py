"""`train`: one run, from a model and data to a directory that is the result (`directory.py` has its layout).

The same command continues a run that stopped, from its last checkpoint, to the same losses.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import Progress
from transformers import TrainerCallback, set_seed

from ..checkpoint.disk.write import explained, output_files, write_json
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.residual import save_residual, write_trained
from ..checkpoint.source.load import check_model_directory, load_config, load_tokenizer
from ..checkpoint.vocabulary import enlarge, rows_of
from ..data.conversation import Example
from ..data.encode import Collator, Encoded, encode
from ..data.prompts import resolve_template
from ..data.read import read_examples
from ..data.rows import examples_from_rows
from ..data.vocabulary import check_known, known_to
from ..errors import ConfigError, Interrupted, TrainingError
from ..export.files import LoraExport, write_lora
from ..export.lora import export_lora
from ..live.offset import trained_values
from ..live.record import record_of
from ..optimizers.names import SPECTRAL
from ..provenance import hardware, package_versions, sha256
from .card import model_card
from .checkpoints import check_checkpoint
from .checks import check_causal
from .directory import (
    RunDirectory,
    absolute,
    check_same_inputs,
    discard,
    finished_results,
    has_only_other_settings,
    last_file,
    leftovers,
    only_writer,
    read_record,
    write_record,
)
from .engine import autocasts, is_main_process, process_count, storage_dtype, training_arguments
from .fitting import fitting_batches, what_it_takes
from .prepare import prepare
from .progress import StepLog, StopAtStepEnd, make_progress, read_log
from .rate_adviser import advise, probe_data
from .ready import ready_split, recipe_of_split
from .recipe import AUTO, Recipe

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from .trainer import RunTrainer

Rows = Sequence[Mapping[str, Any] | Example]
"""Rows of any shape that `examples_from_rows` takes."""
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Set by accelerate's launcher."""


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
    quieten()
    arguments = training_arguments(recipe, directory.state)
    model = absolute(model)
    ready = ready_split(model)
    if ready is not None:
        recipe = recipe_of_split(ready, recipe)
    settings = {"model": str(model), "data": data if isinstance(data, str) else _digest(data), **recipe.as_dict()}
    visible = is_main_process() and not quiet
    bar = progress or make_progress()
    with explained(directory.path):
        if has_only_other_settings(directory, settings):
            # what was interrupted before its first checkpoint saved nothing
            PartialState().wait_for_everyone()
            if is_main_process():
                with only_writer(directory):
                    discard(directory)
            PartialState().wait_for_everyone()
        finished = finished_results(directory, settings)
    if finished is not None:
        if is_main_process() and leftovers(directory):
            with only_writer(directory):
                pass
        if visible:
            bar.console.print(f"{directory.path} is finished already; these are its results", markup=False)
        return RunResult(directory.path, finished, None)
    try:
        with nullcontext() if progress is not None or not visible else bar:
            shown = bar if visible else None
            return _train(model, data, directory, recipe, arguments, settings, shown, label, callbacks)
    except KeyboardInterrupt:
        raise Interrupted(directory.what_is_saved) from None


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
    tokenizer = load_tokenizer(model)
    encoded = _encoded(data, tokenizer, recipe)
    if not recipe.resize_embeddings:
        check_known(encoded.input_ids, known_to(load_config(model)), tokenizer, model)
    checkpoint = directory.last_checkpoint
    check_checkpoint(directory, checkpoint)
    if progress is not None and checkpoint is not None:
        progress.console.print(f"continuing from {checkpoint}", markup=False)

    def batches() -> list[dict[str, Any]] | None:
        if recipe.component == "scored":
            return _scored_batches(encoded, recipe, tokenizer.pad_token_id)
        found = fitting_batches(model, recipe, encoded, tokenizer.pad_token_id)
        if recipe.quantization is not None and progress is not None and label is None:
            progress.console.print(what_it_takes(recipe, found), markup=False, highlight=False, soft_wrap=True)
        return found

    def check(base: Any) -> None:
        if recipe.resize_embeddings and len(tokenizer) > (rows_of(base) or len(tokenizer)):
            enlarge(base, len(tokenizer))
        check_known(encoded.input_ids, rows_of(base), tokenizer, model)
        check_causal(base)

    prepared = prepare(model, recipe, directory, arguments.device, progress, label or recipe.method, batches, check)
    fingerprints = {**prepared.fingerprints, "data": _fingerprint_of_data(encoded)}
    check_same_inputs(directory, fingerprints)
    split = prepared.split if prepared.split is not None else read_record(directory)["split"]
    advice = None
    if recipe.learning_rate == AUTO:
        with _shown(progress, f"{label or recipe.method}, learning rate"):
            advice = _advice(directory, prepared.model, encoded, recipe, arguments, tokenizer.pad_token_id)
        arguments.learning_rate = advice["learning_rate"]
        if progress is not None:
            progress.console.print(f"learning rate {advice['learning_rate']:g}, estimated", markup=False)
    if progress is not None and label is None:
        progress.console.print(encoded.summary, markup=False, highlight=False, soft_wrap=True)
    # nobody writes before everybody has looked
    PartialState().wait_for_everyone()
    with ExitStack() as held:
        if is_main_process():
            held.enter_context(only_writer(directory, settings, checkpoint))
            advised = {"advice": advice} if advice is not None else {}
            write_record(directory, {"settings": settings, "fingerprints": fingerprints, "split": split, **advised})
            record = record_of(prepared.model)
            unsaved = record is not None and record.residual is None
            if recipe.quantization is not None and prepared.split is not None and unsaved:
                save_residual(prepared.model, directory.residual, tokenizer=tokenizer)
        log = StepLog(directory.log, progress=progress, label=label or recipe.method)
        trainer = _run(prepared.model, tokenizer, encoded, recipe, arguments, checkpoint, log, callbacks)
        template = resolve_template(recipe.template, tokenizer)
        trained = trainer.accelerator.unwrap_model(trainer.model).eval()
        whole = trainer.whole_state()
        results = _results(
            recipe, settings, encoded, template, fingerprints, split, trained, read_log(directory.log), advice
        )
        _check_finite(directory, results)
        if is_main_process():
            step = trainer.state.global_step
            _publish(directory, trained, whole, tokenizer, recipe, results, step)
    trainer.accelerator.wait_for_everyone()
    return RunResult(directory.path, results, trained)


def _run(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    recipe: Recipe,
    arguments: SFTConfig,
    checkpoint: Path | None,
    log: StepLog,
    callbacks: Sequence[TrainerCallback],
) -> RunTrainer:
    """Train to the last step.

    Raises:
        KeyboardInterrupt: it was asked to stop before that; a checkpoint is saved.
    """
    from .trainer import RunTrainer

    stop = StopAtStepEnd()
    config = model.config.get_text_config()
    use_cache = getattr(config, "use_cache", None)
    trainer = RunTrainer(
        model,
        arguments,
        encoded,
        tokenizer,
        batch_size=recipe.batch_size,
        loraplus_ratio=recipe.loraplus_ratio,
        spectral=recipe.optimizer == SPECTRAL,
        callbacks=[log, *callbacks, stop],
    )
    log.trainer = trainer
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(type(callback))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        stop.release()
        trainer.release()
        if use_cache is not None:
            config.use_cache = use_cache  # Trainer turns it off
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    return trainer


def _check_finite(directory: RunDirectory, results: dict[str, Any]) -> None:
    """Refuse to publish what JSON cannot say, such as the log of a run that diverged under an earlier version."""
    try:
        json.dumps(results, allow_nan=False)
    except ValueError as error:
        raise TrainingError(
            f"the results of {directory.path} hold numbers that are not finite, see {directory.log}; nothing is "
            f"published. Lower the learning rate ({results['learning_rate']:g}) and name another directory"
        ) from error


def _publish(
    directory: RunDirectory,
    model: Any,
    whole: dict[str, Any] | None,
    tokenizer: Any,
    recipe: Recipe,
    results: dict[str, Any],
    step: int,
) -> None:
    """Put the result into the run's directory, with its card: for adapters one LoRA for the untouched base, or, where
    the residual is quantised, for that."""
    quantized = recipe.quantization is not None
    export: LoraExport | None = None
    if recipe.adapts and not quantized:
        export = export_lora(model, rank=recipe.export_rank, state=whole)
    with output_files(directory.path, last=last_file(recipe.method)) as partial:
        if quantized:
            write_trained(model, partial, final=directory.path)
        elif export is not None:
            write_lora(export, partial)
        else:
            model.save_pretrained(partial, state_dict=whole)
        if recipe.export_rank is not None:
            manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
            trained = f"{directory.state.name}/checkpoint-{step}"
            write_json(partial / MANIFEST, {**manifest, "trained": trained})
        tokenizer.save_pretrained(partial)
        write_json(partial / directory.results.name, results)
        (partial / "README.md").write_text(model_card(results, export), encoding="utf-8")


def _results(
    recipe: Recipe,
    settings: dict[str, Any],
    encoded: Encoded,
    template: str,
    fingerprints: dict[str, str],
    split: dict[str, float | None],
    model: Any,
    log: list[dict[str, float]],
    advice: dict[str, Any] | None,
) -> dict[str, Any]:
    rates = sorted(record["tokens_per_second"] for record in log)
    ready = ready_split(settings["model"])
    quantization = asdict(recipe.quantization) if recipe.quantization is not None else None
    dtype = str(storage_dtype(recipe)) + (" (computing in torch.bfloat16)" if autocasts(recipe) else "")
    return {
        "base": (ready.base if ready is not None else None) or settings["model"],
        "method": recipe.method,
        "rank": recipe.rank if recipe.adapts else None,
        "learning_rate": recipe.learning_rate if advice is None else advice["learning_rate"],
        "advice": advice,
        "seed": recipe.seed,
        "dtype": dtype,
        "losses": [record["loss"] for record in log],
        "grad_norms": [record["grad_norm"] for record in log],
        "tokens_per_second": rates[len(rates) // 2] if rates else 0.0,
        **split,
        "trainable_parameters": sum(trained_values(p) for p in model.parameters() if p.requires_grad),
        "quantization": quantization if ready is None or ready.config is None else ready.config["quantization"],
        "data": encoded.summary,
        "template": template,
        "settings": settings,
        "fingerprints": fingerprints,
        "processes": process_count(),
        "versions": package_versions(),
        "hardware": hardware(),
    }


def _encoded(data: str | Rows, tokenizer: Any, recipe: Recipe) -> Encoded:
    on_hub = isinstance(data, str) and not Path(data).exists()
    if not on_hub and (recipe.data_split, recipe.data_subset) != (Recipe.data_split, Recipe.data_subset):
        given = data if isinstance(data, str) else "the list of rows"
        raise ConfigError(f"data_split and data_subset are for data on the hub; leave them out for {given}")
    if isinstance(data, str):
        examples = read_examples(data, split=recipe.data_split, subset=recipe.data_subset)
    else:
        examples = examples_from_rows(data)
    return encode(examples, tokenizer, template=recipe.template, max_length=recipe.max_length)


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
    if any(os.environ.get(name, "false").lower() == "true" for name in SHARDING):
        raise ConfigError(
            "learning_rate auto needs the whole model on one device, before FSDP or DeepSpeed shard it; give a number"
        )
    if next(model.parameters()).device.type != arguments.device.type:
        model.to(arguments.device)
    found = advise(model, probe_data(encoded, recipe, pad_id), recipe, autocast=autocasts(recipe))
    # several processes find the same up to rounding; all use the first one's
    return broadcast_object_list([asdict(found)])[0]


@contextmanager
def _shown(progress: Progress | None, label: str) -> Iterator[None]:
    """A line on the bar, without an end, while this goes on."""
    task = progress.add_task(label, total=None, note="") if progress is not None else None
    try:
        yield
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)


def _scored_batches(encoded: Encoded, recipe: Recipe, pad_id: int) -> list[dict[str, Any]]:
    """The examples by which components are scored, evenly spread over the data."""
    count, size = min(recipe.scored_examples, len(encoded)), recipe.micro_batch_size
    rows = [encoded[i * len(encoded) // count] for i in range(count)]
    return [dict(Collator(pad_id)(rows[i : i + size])) for i in range(0, count, size)]


def _digest(rows: Rows) -> str:
    given = [row.content() if isinstance(row, Example) else row for row in rows]
    return f"{len(given)} rows, sha256 {sha256(json.dumps(given, sort_keys=True).encode())[:16]}"


def _fingerprint_of_data(encoded: Encoded) -> str:
    rows = zip(encoded.input_ids, encoded.labels, strict=True)
    return sha256(array("q", [len(ids), *ids, *labels]).tobytes() for ids, labels in rows)[:16]


def quieten() -> None:
    """Leave stderr to the bar and to what a user can act on."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
