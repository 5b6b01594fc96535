"""Greedy generation in batches.

Prompts are padded on the left by hand, so that the tokenizer is only asked for ids and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch

from ..data.chat_text import end_of_turn
from ..data.encode import default_bos, token_ids
from ..errors import ConfigError, DataError, listed

Progress = Callable[[int, int], None]


class Continuation(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    """Without special tokens."""
    ended: bool
    """Whether the model, or a stop, ended it; False where it was cut for its length."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    add_bos: bool = True,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt greedily, up to the end of sequence.

    The model runs in evaluation mode with a key-value cache; modes and settings are as before afterwards.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        tokenizer: its tokenizer; never changed.
        prompts: texts, all of them at least one token long.
        max_new_tokens: tokens after which an unfinished continuation is cut.
        batch_size: prompts continued at once, neighbours in length.
        add_bos: put bos before a prompt where the tokenizer does by default; False for prompts in a chat
            template, which writes its own; generation then stops at that template's end of a turn too.
        progress: called after every batch with the number of prompts done and in all.

    Returns:
        The continuations without special tokens, in the order of the prompts.

    Raises:
        ConfigError: `max_new_tokens` or `batch_size` below 1.
        DataError: a prompt without tokens.
    """
    texts = [""] * len(prompts)
    done = 0
    batches = continuations(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, add_bos=add_bos
    )
    with closing(batches):
        for indices, written in batches:
            for index, continuation in zip(indices, written, strict=True):
                texts[index] = continuation.text
            done += len(indices)
            if progress is not None:
                progress(done, len(prompts))
    return texts


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    add_bos: bool = True,
    stop: Sequence[str] = (),
    skip: Container[int] = (),
) -> Generator[tuple[list[int], list[Continuation]], None, None]:
    """As `generate`, batch by batch, each with the numbers of its prompts.

    Which prompts share a batch depends on the prompts alone and not on `skip`, so that whoever leaves out what was
    generated before gets, for the rest, the texts of an uninterrupted pass.

    Args:
        stop: texts before the first of which a continuation is cut.
        skip: numbers of prompts not needed; a batch of nothing else is not generated.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value!r}; give at least 1")
    prefix = default_bos(tokenizer) if add_bos else []
    ids = [prefix + tokens for tokens in token_ids(prompts, tokenizer)]
    empty = [str(number) for number, tokens in enumerate(ids, 1) if not tokens]
    if empty:
        raise DataError(f"nothing to continue: these prompts have no tokens: {listed(empty)}")
    settings = decoding(model, tokenizer, max_new_tokens, None if add_bos else end_of_turn(tokenizer))
    extra = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    with generating(model, settings):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            if all(index in skip for index in batch):
                continue
            written = _continue(model, [ids[i] for i in batch], settings, extra)
            yield batch, [_continuation(tokenizer, *pair, stop) for pair in written]


def _continuation(tokenizer: Any, tokens: list[int], ended: bool, stop: Sequence[str]) -> Continuation:
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    text = cut(whole, stop)
    return Continuation(text, ended or text != whole)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stops."""
    return text[: min([len(text), *(at for at in map(text.find, stop) if at >= 0)])]


def decoding(model: Any, tokenizer: Any, max_new_tokens: int, end: int | None, **sampling: Any) -> Any:
    """How a model writes: greedily, unless told how to sample.

    Args:
        model: whose own settings say where a text ends, as the tokenizer does.
        tokenizer: the model's.
        max_new_tokens: tokens after which an unfinished text is cut.
        end: one more token at which a text ends, or None.
        sampling: of transformers' GenerationConfig, such as do_sample and temperature.

    Returns:
        A GenerationConfig.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) | {tokenizer.eos_token_id, end}
    stops = sorted(end for end in ends if end is not None)
    padding = [tokenizer.pad_token_id, *stops, 0]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=next(token for token in padding if token is not None),
        **(sampling or {"do_sample": False}),
    )


@torch.no_grad()
def _continue(
    model: Any, prompts: list[list[int]], settings: Any, extra: dict[str, Any]
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt, up to and without the first end-of-sequence token, and whether there was one."""
    width = max(len(tokens) for tokens in prompts)
    ids = [[settings.pad_token_id] * (width - len(tokens)) + tokens for tokens in prompts]
    mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts]
    written = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=settings,
        **extra,
    )
    return [_until_stop(row, settings.eos_token_id or []) for row in written[:, width:].tolist()]


def _until_stop(tokens: list[int], stops: list[int]) -> tuple[list[int], bool]:
    for position, token in enumerate(tokens):
        if token in stops:
            return tokens[:position], True
    return tokens, False


@contextmanager
def generating(model: Any, settings: Any) -> Iterator[None]:
    """Evaluation mode and these generation settings inside; afterwards every module is as it was.

    The settings replace the model's own, which `generate` would otherwise fill gaps from, and warn about.
    """
    modes = [(module, module.training) for module in model.modules()]
    defaults = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    model.eval()
    for module, _ in defaults:
        module.generation_config = settings
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own in defaults:
            module.generation_config = own
