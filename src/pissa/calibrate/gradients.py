"""Gradients of a loss with respect to weights, a bounded number of them at a time.

    G = ∂L/∂W,    L the mean loss over all labels of the user's batches

All gradients of a model together are as large as the model, in fp32 twice that. So the weights are taken in portions
of at most `PORTION_BYTES`: for each portion every batch passes forward, and backward only as far down as the portion
lies. Whenever autograd is done with a weight, its gradient of this batch is added to the portion's sum in fp32 and
freed, so that besides the sums one gradient is in memory.

Each weight is stood in for by a leaf of its own that shares its memory. So a weight that two modules share (an
output head tied to the embedding) is differentiated where it was asked for alone, and neither parameters nor their
`grad` are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TargetError, listed

PORTION_BYTES = 1 << 30
"""Gradients collected at a time, in fp32; always at least one."""


def weight_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    parameters: Iterable[str],
    *,
    portion_bytes: int = PORTION_BYTES,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the mean loss, some parameters at a time, in the given order.

    Args:
        model: one whose forward returns a `loss` where it is given labels, as transformers' do. It computes in
            evaluation mode and is left as it was.
        batches: keyword arguments of its forward, labels among them. Labels of −100 do not count.
        parameters: names of parameters, such as "model.layers.0.mlp.up_proj.weight".
        portion_bytes: how many bytes of gradients there may be at a time.

    Yields:
        Parameter name -> gradient in the parameter's shape, fp32, on its device. They can be given up before the next
        portion is asked for.

    Raises:
        TargetError: a parameter that the model does not have, or a quantised one.
        DataError: no batches, a forward without a loss, or a gradient that is zero or not finite.
    """
    batches, names = list(batches), list(dict.fromkeys(parameters))
    held = {name: _parameter(model, name) for name in names}
    if not batches:
        raise DataError("there are no batches to take gradients from; give at least one, with labels")
    for portion in _portions(held, portion_bytes):
        yield _gradients(model, batches, portion)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    try:
        parameter = model.get_submodule(owner)._parameters[leaf]
    except (AttributeError, KeyError):
        parameter = None
    if parameter is None:
        raise TargetError(f"the model has no parameter {name}; names come from model.named_parameters()")
    if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
        raise TargetError(f"{name} is {parameter.dtype} and has no gradient; load the model unquantised")
    return parameter


def _portions(held: Mapping[str, nn.Parameter], limit: int) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for name, parameter in held.items():
        if portion and size + 4 * parameter.numel() > limit:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += 4 * parameter.numel()
    if portion:
        yield portion


def _gradients(model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """One portion: every batch forward and backward once."""
    sums: dict[str, Tensor] = {}
    counted = 0
    with _standing_in(model, names) as leaves:
        weight = 0
        for name, leaf in leaves.items():

            def add(parameter: Tensor, name: str = name) -> None:
                assert parameter.grad is not None
                part = parameter.grad.float() * weight
                sums[name] = sums[name].add_(part) if name in sums else part
                parameter.grad = None

            leaf.register_post_accumulate_grad_hook(add)
        for batch in batches:
            weight = _labels_in(batch)
            counted += weight
            _loss(model, batch).backward()
    unreached = [name for name in names if name not in sums or not sums[name].any()]
    if unreached:
        raise DataError(f"no gradient reaches {listed(unreached)} on this data; give more of it, or exclude them")
    wrong = [name for name in names if not bool(torch.isfinite(sums[name]).all())]
    if wrong:
        raise DataError(
            f"the gradient of {listed(wrong)} is not finite on this data; load the model in bfloat16 or float32"
        )
    return {name: sums[name].div_(counted) for name in names}


@contextmanager
def _standing_in(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode, and leaves in the place of these parameters, the only ones that require a gradient."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    owners = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    originals = {name: owner._parameters[leaf] for name, (owner, leaf) in owners.items()}
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        leaves: dict[str, nn.Parameter] = {}
        for name, (owner, leaf) in owners.items():
            original = originals[name]
            assert original is not None
            leaves[name] = owner._parameters[leaf] = nn.Parameter(original.detach())
        yield leaves
    finally:
        for name, (owner, leaf) in owners.items():
            owner._parameters[leaf] = originals[name]
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def _labels_in(batch: Mapping[str, Any]) -> int:
    """How many labels a batch's mean loss is taken over."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise DataError(f"a batch holds {', '.join(map(str, batch)) or 'nothing'}; it needs labels for a loss")
    return max(1, int((labels != -100).sum()))


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with torch.enable_grad():
        loss = getattr(model(**inputs), "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise DataError(f"{type(model).__name__} returns no loss for these batches; it must, where labels are given")
    return loss
