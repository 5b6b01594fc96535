"""What is measured on a trained model, and on the base: losses problem by problem, accuracy, perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel

from ...data.text_files import texts_of
from ...errors import DataError
from ...evaluation.loss import HeldOutLoss, held_out_loss
from ...evaluation.perplexity import perplexity
from ...live.state import is_offset
from ...training.recipe import Recipe
from .plan import ComparisonPlan
from .solve import Solver, make_solver
from .task import Task

WINDOW, WINDOWS = 512, 32
"""Tokens of a window of text, and how many windows at most, over which a perplexity is taken."""


@dataclass(frozen=True)
class Scorer:
    """Everything that scoring needs besides the model."""

    task: Task
    tokenizer: Any
    recipe: Recipe
    solver: Solver | None
    """Whose problems are solved; None for no accuracy."""
    curve_problems: int
    curve_accuracy: bool
    text: list[int] | None
    """Token ids of the text on which forgetting is measured."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know before anything is solved."""
        return self.solver.task.warnings() if self.solver is not None else ()

    def validation_loss(self, model: Any) -> float:
        """Nats per response token over all validation rows."""
        return self._loss(model, self.task.validation).mean

    def curve_loss(self, model: Any) -> float:
        """The test loss, as `test` has it, of the first test problems alone."""
        return fmean(self._loss(model, self.task.test[: self.curve_problems]).by_example)

    def curve(self, model: Any) -> dict[str, float | None]:
        """What is seen while a model trains: the loss on the first test problems and, where asked for, the share of
        the first problems that it solves."""
        solved = self.solver.correct(model, self.curve_problems) if self.solver and self.curve_accuracy else None
        return {"loss": self.curve_loss(model), "accuracy": sum(solved) / len(solved) if solved else None}

    def test(self, model: Any) -> dict[str, Any]:
        """Nats per token of every test problem; which problems are solved; perplexity."""
        loss = self._loss(model, self.task.test)
        forgetting = self._perplexity(model)
        return {
            "test_losses": loss.by_example,
            "test_tokens": loss.tokens,
            "test_correct": self._correct(model),
            "perplexity": forgetting,
        }

    def _loss(self, model: Any, examples: list[Any]) -> HeldOutLoss:
        loss = held_out_loss(
            model,
            self.tokenizer,
            examples,
            template=self.recipe.template,
            max_length=self.recipe.max_length,
        )
        if len(loss.nats) != len(examples):
            raise DataError(
                f"{len(examples) - len(loss.nats)} of {len(examples)} held-out rows have no response within "
                f"{self.recipe.max_length} tokens; raise max_length"
            )
        return loss

    def _correct(self, model: Any) -> list[bool] | None:
        if self.solver is None:
            return None
        _merge_for_speed(model, self.recipe)
        return self.solver.correct(model)

    def _perplexity(self, model: Any) -> float | None:
        if self.text is None:
            return None
        count = min(WINDOWS, -(-(len(self.text) - 1) // WINDOW))
        return perplexity(model, self.text, window=WINDOW, count=count).value


def make_scorer(task: Task, tokenizer: Any, plan: ComparisonPlan) -> Scorer:
    """A scorer for a plan.

    Raises:
        ConfigError: accuracy is asked for, and answers are not marked, or the task needs problems of its own.
        DataError: the text for forgetting cannot be read or has no tokens.
    """
    solver = make_solver(task, tokenizer, plan)
    text = None
    if plan.forgetting is not None:
        text = _tokens(plan.forgetting, tokenizer)
        if len(text) < 2:
            raise DataError(f"{plan.forgetting} has {len(text)} tokens; forgetting is measured on at least 2")
    return Scorer(task, tokenizer, plan.recipe, solver, plan.curve_problems, plan.curve_accuracy, text)


def _tokens(source: str, tokenizer: Any) -> list[int]:
    ids: list[int] = []
    for piece in texts_of(source):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= WINDOW * WINDOWS:
            break
    return ids


def _merge_for_speed(model: Any, recipe: Recipe) -> None:
    """Fold adapters into weights that are exact enough to hold them: generating is twice as fast."""
    plain = isinstance(model, PeftModel) and recipe.quantization is None and recipe.placement == "residual"
    if plain and not is_offset(model, "default") and all(p.dtype == torch.float32 for p in model.parameters()):
        model.merge_adapter()  # pyright: ignore[reportCallIssue] -- LoraModel's, reached through PeftModel
