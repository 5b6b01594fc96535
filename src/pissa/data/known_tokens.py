"""Whether a model knows every token that a tokenizer made: an id beyond its embedding fails deep inside the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError


def check_known(rows: Iterable[Sequence[int]], known: int | None, tokenizer: Any, model: object) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        rows: of token ids.
        known: how many tokens the model has an embedding for; None where that is not known.
        tokenizer: that made the ids.
        model: the model's name, for the message.

    Raises:
        ConfigError: naming a token, and how many both know.
    """
    largest = max((max(row) for row in rows if len(row)), default=-1)
    if known is None or largest < known:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise ConfigError(
        f"{model} knows {known:,} tokens, and the tokenizer has {len(tokenizer):,}: token {largest} ({token!r}) is in "
        "the data; give the tokenizer that belongs to the model, or train with resize_embeddings (--resize-embeddings)"
    )


def guard_vocabulary(model: Any, tokenizer: Any, name: object) -> None:
    """Have a loaded model refuse token ids that it has no embedding for, before they reach it.

    Args:
        model: a model of transformers, or a PeftModel around one.
        tokenizer: that makes the ids.
        name: the model's, for the message.
    """
    try:
        embedding = model.get_input_embeddings()
        known = int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError, IndexError):
        return

    def check(module: Any, given: tuple[Any, ...]) -> None:
        ids = given[0] if given else None
        if ids is not None and ids.numel() and int(ids.max()) >= known:
            check_known([[int(ids.max())]], known, tokenizer, name)

    embedding.register_forward_pre_hook(check)


def known_to(config: Any) -> int | None:
    """How many tokens a model's configuration says it has an embedding for; None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None
