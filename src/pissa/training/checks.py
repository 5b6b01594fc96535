"""What would train without an error and be wrong, looked for before the first step.

A model that sees the tokens it is to predict, or packed documents that see each other, give a low loss, and no more.
Both are found by gradients: where a position's output depends on a token that it must not see, the gradient of that
token's embedding is not zero, and with a right mask it is zero exactly, whatever the attention's implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

LOOKED_AT = 6
"""Tokens of a text by which a model is tried."""


def check_causal(model: Any) -> None:
    """Refuse a model whose outputs see later tokens, as those of an encoder do.

    Args:
        model: a language model on its device, before anything is adapted.

    Raises:
        ConfigError: saying so.
    """
    ids = _some_ids(model, LOOKED_AT)
    with _anywhere(model):
        seen = _dependence(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, lambda out: out[:, 0])
    if seen is not None and bool(seen[0, 1:].any()):
        raise ConfigError(
            f"{type(model).__name__} sees the tokens that it is to predict (an encoder, whose config says is_decoder "
            "false), so it cannot be trained to continue a text; give a causal language model"
        )


def check_packs(model: Any, collate: Any) -> None:
    """Refuse an attention under which packed documents see each other.

    Args:
        model: a causal language model on its device, adapted or not.
        collate: the collator that makes a batch without padding of rows.

    Raises:
        ConfigError: naming the attention.
    """
    ids = _some_ids(model, 2 * LOOKED_AT)[0].tolist()
    batch = collate([{"input_ids": ids[:LOOKED_AT]}, {"input_ids": ids[LOOKED_AT:]}])
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs.pop("labels", None)
    seen = _dependence(model, inputs, lambda out: out[:, LOOKED_AT:])
    if seen is not None and bool(seen[0, :LOOKED_AT].any()):
        attention = getattr(model.config.get_text_config(), "_attn_implementation", "of this model")
        raise ConfigError(
            f"under attention {attention} packed examples see each other; leave packing out, or use an attention that "
            "keeps them apart, such as flash_attention_2"
        )


def without_gradient(model: Any, *, whole: bool = True) -> list[str]:
    """Modules that a backward pass did not reach: with no gradient, or an adapter whose every gradient is zero.

    Args:
        model: an adapted model after a backward pass from learned tokens.
        whole: whether each process holds whole gradients; of a part of one, zeros say nothing.
    """
    reached: set[str] = set()
    alive: set[str] = set()
    for name, parameter in model.named_parameters():
        # which experts a batch is routed to is the router's choice
        if parameter.requires_grad and "expert" not in name:
            module, adapter, _ = name.removeprefix("base_model.model.").partition(".lora_")
            # of what is trained in full a batch may use no row; factors that are all zero have been warned of
            partial = not adapter or not whole
            alive |= {module} if partial or bool(parameter.any()) else set()
            found = parameter.grad is not None and (partial or bool(parameter.grad.any()))
            reached |= {module} if found else set()
    return sorted(alive - reached)


def _some_ids(model: Any, count: int) -> Tensor:
    """(1, count) different token ids."""
    known = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(count) * 7 % max(known - 1, 1) + 1
    return ids.clamp(max=known - 1)[None].to(next(model.parameters()).device)


def _dependence(model: Any, inputs: dict[str, Any], chosen: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Gradients of some outputs with respect to the embedded tokens, (1, tokens, hidden); None where there are none."""
    embedded: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with _evaluated(model), torch.enable_grad():
        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            logits = model(**inputs, use_cache=False).logits.float()
        finally:
            handle.remove()
        if not embedded or not logits.requires_grad:
            return None
        # different weights, lest gradients cancel
        outputs = chosen(logits)
        weights = torch.arange(1, outputs.numel() + 1, device=outputs.device).reshape(outputs.shape).sin()
        found = torch.autograd.grad((outputs * weights).sum(), embedded[0], allow_unused=True)[0]
    # of weights that are no numbers every gradient is none either; the split names them
    return found if found is not None and bool(found.isfinite().all()) else None


@contextmanager
def _anywhere(model: Any) -> Iterator[None]:
    """The model with an attention that computes where it lies: the flash ones do on GPUs alone."""
    chosen = getattr(model.config.get_text_config(), "_attn_implementation", None)
    stays = next(model.parameters()).device.type == "cuda" or not str(chosen).startswith(("flash", "flex"))
    if not stays:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if not stays:
            model.set_attn_implementation(chosen)


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    """Every module in evaluation mode inside, and as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
