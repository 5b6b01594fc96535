"""The part of the trainer that measures: the validation loss, early stopping, and the step that is kept as the best.

The loss is the mean over all learned tokens of the rows; Trainer's is one over batches, whose learned tokens are not
equally many. Measuring draws from generators of its own, and its seconds and tokens do not count as training's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.sft_trainer import SFTTrainer

from ..checkpoint.attached import put_back
from ..data.encode import IGNORED
from ..stages import stage
from .loss import next_labels


class Measured(SFTTrainer):
    """Measures exactly, and remembers the best step."""

    keep_best: bool
    """Whether the step of the lowest validation loss gets a checkpoint."""
    state_directory: Path
    """Where checkpoints lie."""
    tokens_in_step: int
    step_started: float
    measured: tuple[float, int] = (0.0, 0)
    """Summed loss and learned tokens of the measurement under way, in this process."""

    @property
    def stopped_early(self) -> bool:
        """Whether the validation loss has not become lower for as long as early stopping waits."""
        stops = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        return any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """As Trainer's; training goes on as if nothing had been measured, and a stop that follows from it is saved."""
        clock, tokens = time.perf_counter(), self.tokens_in_step
        device = self.args.device
        with stage("measuring the validation loss"), torch.random.fork_rng([device] if device.type == "cuda" else []):
            metrics = super().evaluate(*args, **options)
        self.tokens_in_step = tokens
        self.step_started += time.perf_counter() - clock
        if self.control.should_training_stop:
            self.control.should_save = True
        return metrics

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As Trainer's; the loss is the mean over learned tokens and not over batches."""
        self.measured = (0.0, 0)
        output = super().evaluation_loop(*args, **options)
        kind = torch.float32 if self.args.device.type == "mps" else torch.float64
        found = torch.tensor(self.measured, dtype=kind, device=self.args.device)
        both: Any = self.accelerator.reduce(found, "sum")
        summed, count = both.tolist()
        assert output.metrics is not None
        output.metrics[f"{options.get('metric_key_prefix', 'eval')}_loss"] = summed / max(count, 1)
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of one batch, which counts by its learned tokens."""
        inputs = self._prepare_inputs(inputs)
        count = int((next_labels(inputs["labels"]) != IGNORED).sum())
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        summed, counted = self.measured
        self.measured = summed + float(loss) * count, counted + count
        return loss, None, None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.keep_best:
            self.control.should_save = True
        return is_best

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the step with the lowest validation loss, where it is kept."""
        step = self.state.best_global_step
        return self.state_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}" if self.keep_best and step else None

    def load_best(self) -> int:
        """Give the model the values that it had at the step with the lowest validation loss, where that is kept.

        Returns:
            The step whose values the model has.
        """
        best, step = self.best_checkpoint, self.state.best_global_step
        if best is None or step is None or step == self.state.global_step:
            return self.state.global_step
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            put_back(model, best)
        else:
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
        return step
