"""How a model is talked to; each field is a flag of `pissa chat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.kinds import Count, CountFromZero, NotNegative, Positive, Seed, ShareAboveZero
from ..config.settings import check_settings
from ..data.prompts import Template
from ..errors import ConfigError

BASE = "base"
"""What to compare with: the adapter's own base, without loading another model."""
DRAWING = ("top_p", "top_k")


@dataclass(frozen=True)
class ChatOptions:
    """Template, history and sampling of a chat.

    Raises:
        ConfigError: a value out of its range, or one that nothing would use.
    """

    panel: ClassVar[str] = "Chat"

    template: Template | None = None
    """Prompt template: chat (the tokenizer's own), alpaca or none; "auto" is chat where the tokenizer has a chat
    template, else alpaca. Left out, it is that of the run, else auto."""
    system: str | None = None
    """System message before the first prompt. Used only when the template is chat."""
    history: bool = True
    """Let the model see what was said before. Used only when the template is chat; the others hold one exchange."""
    max_new_tokens: Count = 512
    """How many tokens a reply may have before it is cut."""
    temperature: NotNegative = 0.0
    """0 takes the likeliest token each time; above 0 tokens are drawn, the more evenly the higher."""
    top_p: ShareAboveZero = 1.0
    """Draw from the likeliest tokens that together have this probability. Used only with a temperature."""
    top_k: CountFromZero = 0
    """Draw from this many of the likeliest tokens; 0 means all. Used only with a temperature."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that are there already become less likely."""
    seed: Seed = 0
    """Seed of what is drawn."""

    def __post_init__(self) -> None:
        check_settings(self)
        unused = [name for name in DRAWING if getattr(self, name) != getattr(ChatOptions, name)]
        if unused and not self.temperature:
            raise ConfigError(f"{' and '.join(unused)} without a temperature: nothing is drawn; add --temperature 0.7")

    @property
    def sampling(self) -> dict[str, Any]:
        """As transformers' GenerationConfig takes it."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        return {"do_sample": bool(drawn), "repetition_penalty": self.repetition_penalty, **drawn}
