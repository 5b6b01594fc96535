"""TRL's SFTTrainer with seven things changed.

loss          on processors too the vocabulary projection is computed at learned tokens only; adapters of the head train
              (`fused.py`)
order         batches of similar length are a function of seed and epoch (`sampler.py`), so that a run continues exactly
gradients     an adapter that the first step gives none ends the run, with its name
validation    the loss is the mean over all learned tokens, and measuring it leaves training as it was; the step with
              the lowest one gets a checkpoint and is what is left in the end, where that is asked for (`measured.py`)
checkpoints   appear whole or not at all
adapters      are saved as the lossless LoRA for the base, from which both adapters are read back exactly; those of a
              quantised residual as they are, with its name (`saved.py`)
logs          have tokens per second, and a step that diverged ends the run before anything of it is kept
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from ..data.encode import IGNORED, Encoded
from ..errors import MissingExtraError, TrainingError, listed
from ..live.factors import MAGNITUDE
from ..optimizers.spectral import SpectralProduct
from .checks import check_packs, without_gradient
from .directory import RunDirectory
from .fused import FusedLoss
from .optimizer import parameter_groups
from .sampler import GROUPED, LengthGroupedBatches
from .saved import Saved
from .sharding import after_sharding, check_engine, is_sharded

EXTENDED = ("_get_train_sampler", "_load_from_checkpoint", "_run_epoch", "_save", "_save_checkpoint")
EXTENDED += ("create_optimizer", "get_decay_parameter_names", "evaluate", "evaluation_loop", "prediction_step")
EXTENDED += ("_determine_best_metric", "_get_eval_sampler", "_load_best_model", "_load_optimizer_and_scheduler")
EXTENDED += ("_prepare_for_training", "save_model")
EXTENDED_OF_TRL = ("create_model_card", "_send_telemetry")
"""What `RunTrainer` overrides although neither transformers nor TRL promises to keep it."""
WIDTH = 8
"""A batch's width is rounded up to a multiple of this, unless pad_to_multiple_of says otherwise."""
ROUTER = ("output_router_logits", "router_aux_loss_coef")


def check_trainer() -> None:
    """Refuse libraries whose trainers lack what is extended here: the extension would silently do nothing.

    Raises:
        MissingExtraError: naming what is missing.
    """
    missing = [name for name in EXTENDED if not callable(getattr(Trainer, name, None))]
    missing += [name for name in EXTENDED_OF_TRL if not callable(getattr(SFTTrainer, name, None))]
    if missing:
        raise MissingExtraError(
            f"Trainer of transformers {transformers.__version__} has no {', '.join(missing)}, which pissa extends; "
            "install the version that constraints.txt names"
        )


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Let SFTTrainer take a model without changing it.

    It rounds adapters of 4- and 8-bit models to bf16, which would change what they compute; refuses an adapted head,
    whose loss is computed otherwise here; and writes its own settings of routers into the model's configuration.
    """
    config = model.config.get_text_config()
    router = {name: getattr(config, name) for name in ROUTER if hasattr(config, name)}
    head = model.get_output_embeddings()
    shadows: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        shadows = {"is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
        if hasattr(head, "base_layer"):
            shadows["get_output_embeddings"] = lambda: head.base_layer
    for name, value in shadows.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name in shadows:
            with suppress(AttributeError):
                delattr(model, name)
        for name, value in router.items():
            setattr(config, name, value)


def _columns(rows: Encoded, tokenizer: Any, *, blanks: int) -> dict[str, list[list[int]]]:
    """Rows as a data set's columns, with rows after them from which nothing is learned."""
    ids = [*rows.input_ids, *([tokenizer.pad_token_id] for _ in range(blanks))]
    return {"input_ids": ids, "labels": [*rows.labels, *([IGNORED] for _ in range(blanks))]}


class RunTrainer(FusedLoss, Saved):
    """Trains on learned tokens; what it logs at each step has loss, gradient norm, learning rate and tokens/s."""

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        rows: Encoded,
        tokenizer: Any,
        *,
        batch_size: int,
        validation: Encoded | None = None,
        loraplus_ratio: float | None = None,
        spectral: bool = False,
        keep_best: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """A trainer of a model, adapted or whole.

        Args:
            model: on any device.
            args: see `training_arguments`.
            rows: to learn.
            tokenizer: the model's.
            batch_size: rows of a step, over all processes.
            validation: rows to measure the validation loss on.
            loraplus_ratio: see `optimizer.py`.
            spectral: move the products of the factors, see `optimizers/spectral.py`.
            keep_best: give the step of the lowest validation loss a checkpoint; see `load_best`.
            callbacks: called at every step.
        """
        check_trainer()
        self.loraplus_ratio, self.spectral, self.keep_best = loraplus_ratio, spectral, keep_best
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._own_forward = vars(self.base).get("forward")
        self._text_config: Any = model.config.get_text_config()
        self._use_cache = getattr(self._text_config, "use_cache", None)
        self.grouped = args.train_sampling_strategy == GROUPED and not args.packing
        columns = _columns(rows, tokenizer, blanks=int(self.grouped))
        measured = None
        if validation is not None:
            # so that no process gets a row twice
            blanks = -len(validation) % (args.per_device_eval_batch_size * args.world_size)
            measured = Dataset.from_dict(_columns(validation, tokenizer, blanks=blanks if args.world_size > 1 else 0))
        width = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else WIDTH
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=width)
        with _left_alone(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=None if args.packing or args.padding_free else collator,
                train_dataset=Dataset.from_dict(columns),
                eval_dataset=measured,
                processing_class=tokenizer,
                callbacks=[*callbacks],
            )
        check_engine(self)
        if self.padding_free:
            check_packs(self.model, self.data_collator)
        self.state_directory = Path(str(self.args.output_dir)).absolute()
        # the loss is a sum over the whole accumulated batch divided by its token count
        self.model_accepts_loss_kwargs = True
        shared = self.args.per_device_train_batch_size * self.args.world_size
        multiple = shared if self.args.world_size > 1 else 1
        self.sampler = LengthGroupedBatches(rows.lengths, batch_size, self.args.seed, multiple=multiple)
        # the fused head reads a weight that a sharding engine gives to its own layer alone
        self.fused: bool | None = False if is_sharded(self) else None
        self.gradients_seen = False
        self.tokens_in_step = 0
        self.step_started = time.perf_counter()

    def release(self) -> None:
        """Leave the model as it was: take the fused head off, and let it use its cache again."""
        if self._use_cache is not None:
            self._text_config.use_cache = self._use_cache
        vars(self.base).pop("forward", None)
        if self._own_forward is not None:
            self.base.forward = self._own_forward

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run writes its own card."""

    def _send_telemetry(self, *_: Any, **__: Any) -> None:
        """Nothing about a run leaves the machine."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler if self.grouped else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        chosen: Any = self.model if model is None else model
        if self.optimizer is None and self.spectral:
            unwrapped = self.accelerator.unwrap_model(chosen)
            self.optimizer = SpectralProduct(unwrapped, self.args.learning_rate, weight_decay=self.args.weight_decay)
        if self.optimizer is None and self.loraplus_ratio is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            groups = parameter_groups(
                self.accelerator.unwrap_model(chosen),
                self.get_decay_parameter_names(chosen),
                learning_rate=self.args.learning_rate,
                ratio=self.loraplus_ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # norms of rows are scales, as those of normalisation layers are
        return [name for name in super().get_decay_parameter_names(model) if MAGNITUDE not in name]

    def _run_epoch(self, *args: Any, **options: Any) -> Any:
        if self.state.global_step >= self.state.max_steps or self.stopped_early:
            # continued from the last step's checkpoint: Trainer would do one step too many
            self.control.should_training_stop = True
            return None
        if not self._total_train_tokens:  # SFTTrainer counts from 0 when a run goes on
            counted = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counted[-1] if counted else 0
        self.sampler.set_epoch(options["epoch"])
        return super()._run_epoch(*args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        """As Trainer's; after the first one every trained parameter must have a gradient.

        Raises:
            TrainingError: naming those that have none.
        """
        loss = super().training_step(*args, **options)
        if not self.gradients_seen and self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self.gradients_seen = True
            self._check_gradients()
        return loss

    def _check_gradients(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        modules = without_gradient(model, whole=not self.is_fsdp_enabled) if isinstance(model, PeftModel) else []
        if modules:
            raise TrainingError(
                f"after the first backward pass no gradient reached {listed(modules)}: the model's code does not call "
                "these modules, or cuts what they give, so they would never be trained; leave them out with "
                "exclude_modules"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the step's numbers to all callbacks, with tokens per second.

        Raises:
            TrainingError: a number that is not finite, before the step is logged or saved.
        """
        self._check_finite(logs)
        if "loss" in logs:
            logs["tokens_per_second"] = self.take_tokens_per_second()
        super().log(logs, start_time)

    def _check_finite(self, logs: dict[str, float]) -> None:
        named = {"loss": "loss", "grad_norm": "gradient norm", "eval_loss": "validation loss"}
        wrong = [f"{name} is {logs[key]}" for key, name in named.items() if not math.isfinite(logs.get(key, 0.0))]
        if wrong:
            last = RunDirectory(self.state_directory.parent).last_checkpoint
            raise TrainingError(
                f"the run diverged at step {self.state.global_step}: {' and '.join(wrong)}; "
                + (f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint before it")
                + f". Nothing is published; lower the learning rate ({self.args.learning_rate:g})"
                + (" and name another directory" if last is not None else "")
            )

    def take_tokens_per_second(self) -> float:
        """Tokens per second over all processes since the last call (padding not counted)."""
        now = time.perf_counter()
        rate = self.tokens_in_step * self.accelerator.num_processes / max(now - self.step_started, 1e-9)
        self.tokens_in_step, self.step_started = 0, now
        return rate

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **options)
        after_sharding(self)
        return prepared
