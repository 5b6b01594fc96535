"""A stand-in for a GPU on a machine that has none: `python stand_in.py` checks all properties on it.

torch's slot for foreign devices gets a backend whose tensors are computed on the CPU. An operation that takes tensors
from both sides, or a generator from the other side, is refused as CUDA would refuse it; a tensor without dimensions on
the CPU is let through, as CUDA does. So code that forgets a `.to(device)` fails here as it would there, and what asks
`is_cuda` takes its CUDA path; kernels, their rounding and their speed are the CPU's.

The device stays in the process once it is there, and other libraries take it for the accelerator that they prefer: a
process of its own is for it alone. torch has had the slot for Python since 2.10.
"""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

import torch
import torch.utils.backend_registration as backend
from properties import PROPERTIES, Unavailable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

NAME = "standin"
CPU = torch.device("cpu")
_generators: dict[int, Any] = {}
"""Those that were made for the stand-in, by torch's address of each; Python's own object may be another one."""


class There(Tensor):
    """A tensor on the stand-in, around one on the CPU."""

    inside: Tensor
    is_cuda = True  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, inside: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def tolist(self) -> Any:
        """The values, which torch gives for no class of tensors but its own."""
        return self.inside.tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"There({self.inside!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Catches what is made on the device or sent there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is asked of either side, and put the result where it belongs."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, Tensor)]
    there = any(isinstance(each, There) for each in tensors)
    target = kwargs.get("device")
    named = torch.device(target).type if target is not None else None
    moves = function._schema.name in ("aten::_to_copy", "aten::copy_", "aten::set_")
    if there and not moves and any(not isinstance(each, There) and each.ndim for each in tensors):
        raise RuntimeError(f"{function}: tensors on two devices, the stand-in's and the CPU's")
    goes = there if named is None else named == NAME
    generator = kwargs.get("generator")
    if generator is not None and goes != (generator._cdata in _generators):
        raise RuntimeError(f"{function}: the generator is on another device than the result")
    inner_args, inner_kwargs = tree_map_only(There, lambda each: each.inside, (args, kwargs))
    if named == NAME:
        inner_kwargs = {**inner_kwargs, "device": CPU}
    with torch._C._DisableTorchDispatch():
        result = function(*inner_args, **inner_kwargs)
    same = {id(each.inside): each for each in tensors if isinstance(each, There)}

    def placed(value: Any) -> Any:
        if id(value) in same:
            return same[id(value)]
        return There(value) if goes and isinstance(value, Tensor) else value

    if function._schema.name == "aten::copy_" and not isinstance(args[0], There):
        return args[0]
    return tree_map(placed, result)


def stand_in() -> torch.device:
    """Make the device, for good."""
    make = torch.Generator

    def generator(device: Any = "cpu") -> Any:
        if torch.device(device).type != NAME:
            return make(device)
        made: Any = make()
        return _generators.setdefault(made._cdata, made)

    backend._setup_privateuseone_for_python_backend(rename=NAME)
    torch.Generator = generator  # pyright: ignore
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor sends values to the device where we see it
    Device().__enter__()
    return torch.device(NAME, 0)


def main() -> int:
    """Check that the stand-in refuses what it should, then every property; print what does not hold."""
    device = stand_in()
    there, failed = torch.ones(3, device=device), 0
    assert isinstance(there, There) and (there + 1.0).sum().item() == 6
    for wrong in (
        lambda: there + torch.ones(3),
        lambda: torch.stack([there, torch.ones(3)]),
        lambda: there[torch.ones(3)],
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
    ):
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("the stand-in let tensors of two devices through")
    for name, check in PROPERTIES.items():
        start = time.perf_counter()
        try:
            check(device)
        except Unavailable as reason:
            print(f"skipped: {name}: {reason}")
        except Exception:
            failed += 1
            print(f"failed: {name}\n{traceback.format_exc()}")
        else:
            print(f"holds: {name} ({time.perf_counter() - start:.1f} s)")
    return failed


if __name__ == "__main__":
    sys.exit(main())
