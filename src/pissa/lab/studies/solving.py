"""Problems to learn and to solve: what one run of the study of generation measures, before training and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ...evaluate.loss import HeldOutLoss, held_out_loss
from ...evaluate.tasks import Options, find_task
from ...train.rows import examples_from_rows
from .few_bits import FORMATS, build, calibration
from .language import Row
from .lm import InMemory, LanguageTask, cell, final_loss, recipe
from .study import Settings

BASE = "base"
RANK = 8
Score = Callable[[Any, Any], Mapping[str, float]]
"""(model, tokenizer) -> the share of the test problems that the model solves, by metric."""


@dataclass(frozen=True)
class Part:
    """One body of problems, and the methods that learn it."""

    settings: Settings
    """Of the study."""
    name: str
    """"problems" or "code"."""
    task: LanguageTask
    """Base, rows to learn and to test the loss on, length of a run."""
    validation: Sequence[Row]
    """Rows whose loss decides on a learning rate; none of the task's."""
    methods: tuple[str, ...]
    """As in `Recipe`; "FORMAT METHOD" on a base in few bits."""
    scores: tuple[str, ...]
    """The metrics that `score` gives."""
    score: Score

    @property
    def about(self) -> dict[str, Any]:
        """What decides on a cell's result beside method, rate and seed."""
        return {"part": self.name, "task": self.task.name, "steps": self.task.steps}

    @property
    def quantized(self) -> tuple[str, ...]:
        """The methods whose base is in few bits."""
        return tuple(method for method in self.methods if method.startswith(FORMATS))

    def trained(self, method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        """One run, judged on the test problems."""
        return self._run(method, rate, seed, self.task.held_out, self.score)

    def tried(self, method: str, rate: float, seed: int, **_: Any) -> dict[str, Any]:
        """One run, judged by the validation rows' loss alone."""
        return self._run(method, rate, seed, self.validation, None)

    def untrained(self, start: str, **_: Any) -> dict[str, Any]:
        """The base, or what it is in few bits under a method, judged as after training."""
        model = self._memory.copy() if start == BASE else self._few_bits(start, 0)
        loss = self._loss(model.eval(), self.task.held_out)
        by_problem = [nats / tokens for nats, tokens in zip(loss.nats, loss.tokens, strict=True)]
        found = {"held_out_loss": loss.mean, "loss_by_problem": by_problem}
        return {**found, **self.score(model, self._memory.tokenizer)}

    def _run(self, method: str, rate: float, seed: int, held_out: Sequence[Row], score: Score | None) -> dict[str, Any]:
        if method not in self.quantized:
            task = replace(self.task, held_out=list(held_out))
            adapter = {} if method == "full" else {"rank": RANK}
            return cell(self.settings, task, recipe(task, method, rate, seed, **adapter), also=score)
        model = self._few_bits(method, seed)
        seen = self._memory.train(model, rate, seed)
        found = {"losses": seen.losses, "grad_norms": seen.grad_norms, "final_loss": final_loss(seen.losses)}
        found["held_out_loss"] = self._loss(model.eval(), held_out).mean
        return {**found, **(score(model, self._memory.tokenizer) if score is not None else {})}

    def _few_bits(self, method: str, seed: int) -> Any:
        form, _, name = method.partition(" ")
        batches = calibration(self._memory) if form == "gptq" else ()
        return build(self._memory.copy(), form, name, rank=RANK, seed=seed, batches=batches)

    def _loss(self, model: Any, rows: Sequence[Row]) -> HeldOutLoss:
        return held_out_loss(model, self._memory.tokenizer, examples_from_rows(rows), batch_size=16)

    @cached_property
    def _memory(self) -> InMemory:
        return InMemory(self.task)


def word_problems(rows: Sequence[Row], new_tokens: int) -> Score:
    """Exact match of the answers that solutions to these problems state, as `pissa eval --task gsm8k` has it."""
    problems = examples_from_rows(rows)
    options = Options(max_new_tokens=new_tokens, batch_size=32)
    return lambda model, tokenizer: {"exact_match": find_task("gsm8k").run(model, tokenizer, problems, options).value}
