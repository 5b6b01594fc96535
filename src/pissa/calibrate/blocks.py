"""A model's forward pass cut at its blocks.

Transformers are a row of blocks, and what a block computes depends on its input alone. So a text can be taken through
the model block by block: to run call k of a block, the model's own forward runs with every earlier call answered by
what call k − 1 returned, and stops once call k is done. Masks, position embeddings and whatever else a model hands to
its blocks are made by the model itself, each time: cheap beside a block, and right for every architecture whose blocks
are connected by what they return. In a model with several rows of blocks (encoder and decoder, a vision tower) each row
answers with its own last result. `probe` records on one batch what every call must return, so that a model of another
kind (skip connections past blocks, caches shared between them) is noticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 256
TOLERANCE = 1e-3
"""Relative deviation of a block's output that passes as rounding: kernels may differ from run to run."""


class Done(BaseException):
    """Ends a forward pass that is not needed any further."""


@dataclass
class Trace:
    """What one batch's forward pass was seen to do."""

    calls: list[str] = field(default_factory=list)
    """Name of the block of each call, in order."""
    samples: list[Tensor | None] = field(default_factory=list)
    """Some values of what each call returned."""
    shared: dict[str, str] = field(default_factory=dict)
    """Layer -> the first layer that was given the very same tensor; only layers that ran."""


def block_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """All members of the outermost `nn.ModuleList`s that hold any of these layers, in the model's order."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    rows = set()
    for name in names:
        parts = name.split(".")
        ancestors = (".".join(parts[:depth]) for depth in range(len(parts)))
        rows.update(next(([ancestor] for ancestor in ancestors if ancestor in lists), []))
    return [name for name, _ in model.named_modules() if name.rpartition(".")[0] in rows and name not in rows]


def block_of(name: str, blocks: Sequence[str]) -> str | None:
    """The block that a layer is or lies in."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)


def run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One forward pass, given up where a hook says that it is done."""
    devices = (parameter.device for parameter in model.parameters())
    # on the meta device lies what is fetched when its layer is called
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    try:
        model(**inputs)
    except Done:
        return


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def replaced(blocks: Mapping[str, nn.Module], make: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Every block's forward replaced by `make(name, forward)` for the time of the context."""
    with ExitStack() as stack:
        for name, block in blocks.items():
            own = block.__dict__.get("forward")
            forward = block.forward
            block.forward = make(name, forward)
            stack.callback(_put_back, block, own)
        yield


def _put_back(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.__dict__["forward"]
    else:
        block.forward = own


@contextmanager
def listening(model: nn.Module, hear: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Each named layer's input is handed to its function, whenever the layer is called."""
    with ExitStack() as stack:
        for name, function in hear.items():

            def hook(module: nn.Module, args: Any, kwargs: Any, function: Callable = function) -> None:
                function((args[0] if args else next(iter(kwargs.values()))).detach())

            stack.enter_context(_removed(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def probe(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str], blocks: Sequence[str]) -> Trace:
    """Run one batch through the whole model to see in which order blocks are called and which layers share an input."""
    trace, owner, alive = Trace(), {}, []

    def make(name: str, forward: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            trace.calls.append(name)
            trace.samples.append(sample_of(result))
            alive.clear()
            owner.clear()
            return result

        return noted

    def hear(name: str) -> Callable[[Tensor], None]:
        def seen(x: Tensor) -> None:
            # kept alive until the block is done, so that no other tensor gets its identity
            alive.append(x)
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            trace.shared.setdefault(name, owner.setdefault(key, name))

        return seen

    members = {name: model.get_submodule(name) for name in blocks}
    with quiet(model), replaced(members, make), listening(model, {name: hear(name) for name in names}):
        run(model, batch)
    return trace


def sample_of(result: Any) -> Tensor | None:
    """Some values of a block's first tensor, fp32; None where it returns none."""
    tensor = next(
        (part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, Tensor)), None
    )
    if tensor is None:
        return None
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].float().clone()


def agree(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two samples are equal up to rounding."""
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and float((left - right).abs().max()) <= TOLERANCE * float(right.abs().max())


class Sweep:
    """Takes batches through the model one block call at a time, keeping what the last call returned for each batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> None:
        self.model, self.batches = model, batches
        self.blocks = {name: model.get_submodule(name) for name in blocks}
        self.position = 0
        """The call that comes next."""
        self.results: list[dict[str, Any]] = [{} for _ in batches]
        """For each batch: what the last call in each row of blocks returned."""

    def advance(self, hear: Callable[[int], Mapping[str, Callable[[Tensor], None]]]) -> Tensor | None:
        """Run the next call for every batch; `hear(batch)` says who listens. Returns a sample of the first result."""
        first = None
        for number in range(len(self.batches)):
            row, result = self._run(number, hear(number))
            self.results[number][row] = result
            if number == 0:
                first = sample_of(result)
        self.position += 1
        return first

    def finish(self, hear: Callable[[int], Mapping[str, Callable[[Tensor], None]]]) -> None:
        """Run what lies outside the blocks, for every batch."""
        for number in range(len(self.batches)):
            self._run(number, hear(number))

    def _run(self, number: int, hear: Mapping[str, Callable[[Tensor], None]]) -> tuple[str, Any]:
        calls, found = 0, ("", None)

        def make(name: str, forward: Callable) -> Callable:
            row = name.rpartition(".")[0]

            def answered(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls, found
                calls += 1
                if calls <= self.position:
                    return self.results[number][row]
                found = row, forward(*args, **kwargs)
                raise Done

            return answered

        with quiet(self.model), replaced(self.blocks, make), listening(self.model, hear):
            run(self.model, self.batches[number])
        return found
