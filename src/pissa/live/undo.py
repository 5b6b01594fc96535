"""A model that is given back as it was when changing it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Put modules, parameters and flags back as they were if the block raises; references are kept, no copies."""
    runtime: Any = model
    held = [(m, dict(m._modules), dict(m._parameters), m.training) for m in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(model.__dict__)
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    settings = getattr(model, "config", None)
    before = dict(vars(settings)) if isinstance(settings, PreTrainedConfig) else None
    try:
        yield
    except BaseException:
        for name in set(model.__dict__) - set(attributes):
            del model.__dict__[name]
        model.__dict__.update(attributes)
        for module, children, parameters, training in held:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if ties:
            runtime.all_tied_weights_keys.update(ties)
        if before is not None:
            vars(settings).clear()
            vars(settings).update(before)
        raise
