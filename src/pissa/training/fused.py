"""The part of the trainer that computes the loss: at learned tokens alone, on processors too, where TRL's fused head
computes all; an adapted head, which that head would pass by, by the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer

from ..data.encode import IGNORED
from ..live.adalora import penalty
from ..live.state import active_adapter_name
from .loss import backbone_gives, next_labels, response_loss

AGREE = 0.02
"""Largest relative difference of the fused loss from the model's own on the first batch; bf16 stays below it."""


class FusedLoss(SFTTrainer):
    """Projects learned tokens alone onto the vocabulary."""

    base: Any
    """The model without its adapter."""
    fused: bool | None
    """Whether the fused head computes the loss; None before the first batch."""
    tokens_in_step: int
    """Tokens since the last log, padding not counted."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens_in_step += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        if self.fused is None:
            self.fused = self._fused_is_right(model, inputs)
        if self.fused:
            with self._only_learned(inputs) as chosen:
                loss = super().compute_loss(model, chosen, num_items_in_batch=num_items_in_batch)
        else:
            loss = self._plain_loss(model, inputs, num_items_in_batch)
        return loss + self._orthogonality()

    def _plain_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """The mean over learned tokens of the model's own logits."""
        loss, count = response_loss(model, self._head(), inputs)
        if num_items_in_batch is None:
            return loss / max(count, 1)
        # gradients are averaged over processes, the token count is that of all of them together
        return loss * self.accelerator.num_processes / num_items_in_batch

    def _head(self) -> Any:
        return self.accelerator.unwrap_model(self.model).get_output_embeddings()

    @contextmanager
    def _only_learned(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inputs such that the fused head computes learned tokens only, which TRL does on GPUs alone."""
        if inputs["input_ids"].device.type != "cpu" or self.label_smoother is not None:
            yield inputs
            return
        targets = next_labels(inputs["labels"])
        learned = targets != IGNORED
        others = {name: value for name, value in inputs.items() if name != "labels"}
        backbone: Any = self.base.base_model
        with backbone_gives(backbone, learned):
            yield {**others, "shift_labels": targets[learned][None]}

    @torch.no_grad()
    def _fused_is_right(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Whether the fused head computes what the model's own forward does, tried on the first batch.

        It multiplies hidden states by the head's weight, so an adapted head, or a model that does something of its own
        between the two, needs its own forward.
        """
        if type(self._head()) is not nn.Linear or self.base.base_model is self.base:
            return False
        training = model.training
        model.eval()
        try:
            own, count = response_loss(model, self._head(), inputs)
            with self._only_learned(inputs) as chosen:
                fused = -model(**{**chosen, "use_cache": False}, fused_lm_head=True).log_probs.sum()
        finally:
            model.train(training)
        agree = count == 0 or bool((fused.float() - own).abs() <= AGREE * own.abs())
        return agree or not bool(torch.isfinite(own))

    def _orthogonality(self) -> Tensor | float:
        """AdaLoRA's penalty for this part of the step: its gradient alone, so that the logged loss is the data's."""
        model = self.accelerator.unwrap_model(self.model)
        found = penalty(model, active_adapter_name(model)) if isinstance(model, PeftModel) else None
        if found is None:
            return 0.0
        return (found - found.detach()) / self.args.gradient_accumulation_steps
