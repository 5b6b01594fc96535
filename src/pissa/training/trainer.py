"""transformers' Trainer with five things changed.

loss          the vocabulary projection is computed at response tokens only: it is a quarter of a step
order         batches of similar length, a function of seed and epoch (`sampler.py`)
checkpoints   appear whole or not at all
adapters      are saved as the lossless LoRA for the base, from which both adapters are read back exactly; those of a
              quantised residual as they are, with its name
logs          have tokens per second, and a step that diverged ends the run before anything of it is kept
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..checkpoint.disk.write import TEMPORARY_PREFIX, durable_rename, explained
from ..checkpoint.residual import write_trained
from ..data.encode import IGNORED
from ..errors import ConfigError, MissingExtraError, OutputError, TrainingError
from ..export import export_state, write_lora
from ..live.adalora import penalty
from ..live.factors import MAGNITUDE
from ..live.record import record_of
from ..live.state import TRAINABLE, active_adapter_name, is_offset
from .checkpoints import list_files
from .directory import RunDirectory
from .optimizer import parameter_groups
from .sampler import LengthGroupedBatches

KEPT_CHECKPOINTS = 2
EXTENDED = ("_get_train_sampler", "_load_from_checkpoint", "_run_epoch", "_save", "_save_checkpoint")
EXTENDED += ("create_optimizer", "get_decay_parameter_names")
"""What `ResponseTrainer` overrides of Trainer although transformers does not promise to keep it."""


def response_loss(model: Any, head: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy over the labelled tokens, with logits computed nowhere else.

    Args:
        model: a causal language model, possibly wrapped.
        head: its output projection, whose input is (batch, length, hidden).
        inputs: input_ids, attention_mask and labels, each (batch, length); label t is predicted at t − 1.

    Returns:
        The sum in nats, fp32, and the number of tokens it runs over.
    """
    losses, _ = token_losses(model, head, inputs)
    return losses.sum(), len(losses)


def token_losses(model: Any, head: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every labelled token, with logits computed nowhere else.

    Args:
        model, head, inputs: see `response_loss`.

    Returns:
        The losses in nats, fp32, and the row of the batch that each belongs to; both (tokens,).
    """
    labels = inputs["labels"]
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    learned = targets != IGNORED
    with _only_at(head, learned):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[learned], reduction="none")
    return losses, learned.nonzero()[:, 0]


def check_trainer() -> None:
    """Refuse a transformers whose Trainer lacks what is extended here: the extension would silently do nothing.

    Raises:
        MissingExtraError: naming what is missing.
    """
    missing = [name for name in EXTENDED if not callable(getattr(Trainer, name, None))]
    if missing:
        raise MissingExtraError(
            f"Trainer of transformers {transformers.__version__} has no {', '.join(missing)}, which pissa extends; "
            "install the version that constraints.txt names"
        )


def _needs_whole_layers(model: Any) -> bool:
    """Whether a model's layers or its adapter's frozen half would not survive sharding."""
    record = record_of(model)
    values_apart = isinstance(getattr(model, "peft_config", {}).get(TRAINABLE), AdaLoraConfig)
    return (record is not None and record.quantized) or is_offset(model, TRAINABLE) or values_apart


@contextmanager
def _only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the projection see the hidden states of these positions only; logits are then (positions, vocabulary)."""
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][positions], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _torch_explained(path: Path) -> Iterator[None]:
    """Turn what `torch.save` says of a full disk into one clear line.

    Raises:
        OutputError: in place of such an error; any other passes as it is.
    """
    try:
        yield
    except RuntimeError as error:
        # torch's writer hides the system's reason
        if "inline_container" in str(error) or "iostream error" in str(error):
            raise OutputError(
                f"the disk that holds {path} is full, or fails; make room and run the same command again"
            ) from error
        raise


class ResponseTrainer(Trainer):
    """Trains on response tokens; what it logs at each step has loss, gradient norm, learning rate and tokens/s."""

    def __init__(
        self, *args: Any, lengths: list[int], batch_size: int, loraplus_ratio: float | None = None, **options: Any
    ) -> None:
        check_trainer()
        self.loraplus_ratio = loraplus_ratio
        super().__init__(*args, **options)
        self._check_engine()
        self.state_directory = Path(str(self.args.output_dir)).absolute()
        # our loss is a sum over the whole accumulated batch divided by its token count
        self.model_accepts_loss_kwargs = True
        shared = self.args.per_device_train_batch_size * self.args.world_size
        multiple = shared if self.args.world_size > 1 else 1
        self.sampler = LengthGroupedBatches(lengths, batch_size, self.args.seed, multiple=multiple)
        self.tokens_in_step = 0
        self.step_started = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedBatches:
        return self.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        chosen: Any = self.model if model is None else model
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
        if self.state.global_step >= self.state.max_steps:
            # continued from the last step's checkpoint: Trainer would do one step too many
            self.control.should_training_stop = True
            return None
        self.sampler.set_epoch(options["epoch"])
        return super()._run_epoch(*args, **options)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        self.tokens_in_step += int(inputs["attention_mask"].sum())
        loss, count = response_loss(model, head, inputs)
        if num_items_in_batch is None:
            loss = loss / max(count, 1)
        else:
            # gradients are averaged over processes, the token count is that of all of them together
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return loss + self._orthogonality()

    def _orthogonality(self) -> Tensor | float:
        """AdaLoRA's penalty for this part of the step: its gradient alone, so that the logged loss is the data's."""
        model = self.accelerator.unwrap_model(self.model)
        found = penalty(model, active_adapter_name(model)) if isinstance(model, PeftModel) else None
        if found is None:
            return 0.0
        return (found - found.detach()) / self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the step's numbers to all callbacks, with tokens per second.

        Raises:
            TrainingError: a number that is not finite, before the step is logged or saved.
        """
        if "loss" in logs:
            self._check_finite(logs)
            logs["tokens_per_second"] = self.take_tokens_per_second()
        super().log(logs, start_time)

    def _check_finite(self, logs: dict[str, float]) -> None:
        named = {"loss": "loss", "grad_norm": "gradient norm"}
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = state / f"{TEMPORARY_PREFIX}{name}"
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            with explained(partial), _torch_explained(state):
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(state)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with explained(partial):
                list_files(partial / name)
                durable_rename(partial / name, state / name)
            shutil.rmtree(partial, ignore_errors=True)
            rotate_checkpoints(output_dir=str(state), save_total_limit=KEPT_CHECKPOINTS, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            record = record_of(model)
            if record is not None and record.quantized:
                write_trained(model, directory, final=self.state_directory / directory.name)
                return None
            write_lora(export_state(model, state=state_dict), directory)
        return None

    def whole_state(self) -> dict[str, Any] | None:
        """The model's state dict, gathered, where its engine shards it; None where every process holds it whole."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

    def _check_engine(self) -> None:
        """Refuse engines whose state cannot be gathered into one LoRA.

        Raises:
            ConfigError: with the setting to use instead.
        """
        state: Any = self.accelerator.state
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            raise ConfigError(
                "DeepSpeed ZeRO-3 shards what pissa splits and saves; use ZeRO-2 (zero_stage: 2), or FSDP"
            )
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
            raise ConfigError("with FSDP a run is saved whole; set fsdp_state_dict_type: FULL_STATE_DICT")
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3)
        if sharded and _needs_whole_layers(self.accelerator.unwrap_model(self.model)):
            raise ConfigError(
                'a quantised residual, placement "offset" and AdaLoRA need whole layers, and FSDP shards them; use '
                "several processes without FSDP"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # adapters were loaded with the model, before the optimizer was made for them
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
