"""How an evaluation is run; each field is a flag of `pissa eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.kinds import Count, CountFromTwo, File, Name
from ..config.settings import check_settings
from ..data.prompts import Template


@dataclass(frozen=True)
class EvaluationOptions:
    """How a task is run; a task refuses what it has no use for, see `Task.check`.

    Raises:
        ConfigError: a value out of its range.

    Example:
        >>> from pissa import EvaluationOptions
        >>> EvaluationOptions(batch_size=32, limit=100).batch_size
        32
    """

    panel: ClassVar[str] = "Evaluation"

    template: Template | None = None
    """Prompt template: chat (the tokenizer's own), alpaca or none; "auto" is chat where the tokenizer has a chat
    template, else alpaca. Left out, it is that of the run, else the task's own."""
    batch_size: Count = 16
    """How many problems are worked on at once."""
    max_new_tokens: Count | None = None
    """How many tokens a continuation may have before it is cut. Left out, as many as the task says."""
    window: CountFromTwo = 512
    """How many tokens the model sees at a time. Used only when the task is perplexity."""
    allow_code_execution: bool = False
    """Let code that the model wrote run on this machine. Used only when the task is humaneval or mbpp, which do nothing
    without it."""
    allow_unconfined_code: bool = False
    """Let that code run also where this machine cannot keep it from everything that it should not do; the refusal
    without it says from what. Used only when the task is humaneval or mbpp."""
    judge_url: Name | None = None
    """Base address of an endpoint that speaks OpenAI's chat completions, such as https://HOST/v1. Used only when the
    task is mt-bench."""
    judge_model: Name | None = None
    """The judge, as the endpoint calls it. Used only when the task is mt-bench."""
    judge_key_env: Name | None = None
    """Environment variable that holds the endpoint's key. Used only when the task is mt-bench."""
    judge_prompts: File | None = None
    """The judge's instructions, a file in FastChat's format. Left out, pissa's own. Used only when the task is
    mt-bench."""
    references: File | None = None
    """Reference answers to math, reasoning and coding, as .jsonl. Used only when the task is mt-bench."""
    limit: Count | None = None
    """Only the first so many problems, or windows of a text. Left out, all."""

    def __post_init__(self) -> None:
        check_settings(self)
