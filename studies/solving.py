"""Problems to learn and to solve: what the study of generation measures of a model, before training and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pissa.evaluation.loss import HeldOutLoss, held_out_loss

from .few_bits import FORMATS, build, calibration
from .language import fine_tune
from .lm import InMemory, LanguageTask, final_loss, recipe
from .study import Settings

BASE = "base"
RANK = 8
Score = Callable[[Any, Any], Mapping[str, float]]
"""(model, tokenizer) -> the share of the test problems that the model solves, by metric."""


@dataclass(frozen=True)
class Part:
    """One body of problems, and the methods that learn it."""

    settings: Settings
    """The study's settings."""
    name: str
    """"problems" or "code"."""
    task: LanguageTask
    """Base, and rows to learn, to choose by and to test on."""
    methods: tuple[str, ...]
    """As in `Recipe`; "FORMAT METHOD" on a base in few bits."""
    scores: tuple[str, ...]
    """The metrics that `score` gives."""
    score: Score

    @property
    def quantized(self) -> tuple[str, ...]:
        """The methods whose base is in few bits."""
        return tuple(method for method in self.methods if method.startswith(FORMATS))

    def trained(
        self, task: LanguageTask, /, method: str, rate: float, seed: int, scored: bool = False, **_: Any
    ) -> dict[str, Any]:
        """One run: its curves, and the loss on the rows that a task tests on.

        Args:
            task: this part's, or the same with other rows to test on.
            method: one of the part's.
            rate: learning rate at its peak.
            seed: of initial factors and order.
            scored: solve the test problems as well.
        """
        score = self.score if scored else lambda *_: {}
        if method not in self.quantized:
            adapter = {} if method == "full" else {"rank": RANK}
            own = recipe(task, method, rate, seed, **adapter)
            found = fine_tune(replace(self.settings, model=task.base), own, task.train, task.held_out, also=score)
            return {**found, "final_loss": final_loss(found["losses"])}
        model = self._few_bits(method, seed)
        seen = self._memory.train(model, rate, seed)
        return {
            "losses": seen.losses,
            "grad_norms": seen.grad_norms,
            "final_loss": final_loss(seen.losses),
            "held_out_loss": self._loss(model.eval(), task).mean,
            **score(model, self._memory.tokenizer),
        }

    def untrained(self, start: str, **_: Any) -> dict[str, Any]:
        """The base, or what it is in few bits under a method, judged as after training."""
        model = self._memory.copy() if start == BASE else self._few_bits(start, 0)
        loss = self._loss(model.eval(), self.task)
        by_problem = [nats / tokens for nats, tokens in zip(loss.nats, loss.tokens, strict=True)]
        found = {"held_out_loss": loss.mean, "loss_by_problem": by_problem}
        return {**found, **self.score(model, self._memory.tokenizer)}

    def _few_bits(self, method: str, seed: int) -> Any:
        form, _, name = method.partition(" ")
        batches = calibration(self._memory) if form == "gptq" else ()
        return build(self._memory.copy(), form, name, rank=RANK, seed=seed, batches=batches)

    def _loss(self, model: Any, task: LanguageTask) -> HeldOutLoss:
        memory = self._memory.on(task)
        return held_out_loss(model, memory.tokenizer, memory.held_out, batch_size=16)

    @cached_property
    def _memory(self) -> InMemory:
        return InMemory(self.task)
