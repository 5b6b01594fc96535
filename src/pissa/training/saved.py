"""The part of the trainer that saves and goes on: checkpoints appear whole or not at all, and adapters are saved as the
lossless LoRA for the base, from which both adapters are read back exactly; those of a quantised residual as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..checkpoint.disk.write import TEMPORARY_PREFIX, durable_rename, explained
from ..checkpoint.residual import write_trained
from ..errors import OutputError
from ..export.files import write_lora
from ..export.lora import export_state
from ..live.record import record_of
from .checkpoints import list_files
from .measured import Measured
from .sharding import whole_state

KEPT_CHECKPOINTS = 2


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


class Saved(Measured):
    """Saves a run so that it can be read back, or leaves it as it was."""

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
            best = str(self.best_checkpoint) if self.best_checkpoint is not None else None
            limit: dict[str, Any] = {"save_total_limit": KEPT_CHECKPOINTS, "use_mtime": False}
            rotate_checkpoints(output_dir=str(state), best_model_checkpoint=best, **limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            # the tokenizer is the run's, not each checkpoint's
            tokenizer, self.processing_class = self.processing_class, None
            try:
                return super()._save(output_dir, state_dict)
            finally:
                self.processing_class = tokenizer
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
        return whole_state(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; where the engine shards it, gathered with the frozen halves that the LoRA needs."""
        state = self.whole_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler, optimizer = self.lr_scheduler, self.optimizer
        if checkpoint is not None and isinstance(scheduler, LambdaLR) and isinstance(optimizer, Optimizer):
            # a checkpoint's rates are those of the length that the run had then
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * share(scheduler.last_epoch) for base, share in rates]
            for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # adapters were loaded with the model, before the optimizer was made for them
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
