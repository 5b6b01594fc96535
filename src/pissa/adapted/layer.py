"""PEFT's layers, where their weights are residuals: every mixture of adapters is one of adapters for the base.

Someone who knows nothing of residuals takes the adapters away, scales one, adds two up, or names "__base__" for some
rows of a batch. What they mean is, with σ_a the factor that adapter a is scaled by against its own s (0 where it is
not active),

    W + Σ_a σ_a · s·(B_a·A_a − B0·A0)  =  W_res + Σ_a σ_a · s·B_a·A_a + (1 − Σ_a σ_a) · s·B0·A0

and the right side is what PEFT's own layer computes once `pissa_init` is active as well, with the share 1 − Σ_a σ_a.
One adapter at its own scale has share 0, and costs nothing; none has share 1, which is the base.

In every placement, a layer's weight is not there to be taken: code that reads it passes the adapter by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from ..errors import PissaError, TargetError
from ..live.marks import PRESERVING_INITIALISATIONS
from ..live.state import INITIAL, TRAINABLE

SHOWN = "_pissa_shown"
"""A layer's attribute: its weight, and what is shown of it."""
NOTHING = 1e-9
"""A share below which it is a rounding error."""


class AdaptedLayer:
    """Mixed into the class of one of PEFT's layers, before it. `adapt_layer` does it."""

    adapts: str
    """The name of the weight's module, or of the parameter."""
    start_scale: float | None
    """PEFT's own scale of `pissa_init`; None where the weight is the base's."""
    started: set[str]
    """Adapters that start from `pissa_init`, whose own scale is the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = super()
        if self.start_scale is None:
            return layer.forward(x, *args, **kwargs)
        runtime: Any = self
        rows = kwargs.get("adapter_names")
        if rows is not None and not runtime.disable_adapters:
            kwargs["adapter_names"] = self._base_rows(rows)
            with self._start_added(1.0):
                return layer.forward(x, *args, **kwargs)
        share = self.share_of_start()
        if abs(share) < NOTHING:
            return layer.forward(x, *args, **kwargs)
        if runtime.merged:
            raise PissaError(f"{self.adapts}: adapters are merged into its weight: call unmerge_adapter() first")
        with self._start_added(share):
            return layer.forward(x, *args, **kwargs)

    def share_of_start(self, adapters: Sequence[str] | None = None) -> float:
        """How much of `pissa_init` is missing beside these adapters, the active ones by default, see the equation."""
        runtime: Any = self
        if adapters is not None:
            chosen = adapters
        elif runtime.disable_adapters:
            chosen = []
        elif runtime.merged:
            chosen = runtime.merged_adapters
        else:
            chosen = [adapter for adapter in runtime.active_adapters if adapter != INITIAL]
        known = [a for a in chosen if a in runtime.scaling and (a in self.started or a == INITIAL)]
        return 1.0 - sum(runtime.scaling[a] / self.start_scale for a in known)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's `merge`, of one adapter at its own scale."""
        runtime: Any = self
        names = runtime.active_adapters if adapter_names is None else adapter_names
        wanted = [*runtime.merged_adapters, *[name for name in names if name not in runtime.merged_adapters]]
        if self.start_scale is not None and wanted and abs(self.share_of_start(wanted)) > NOTHING:
            raise PissaError(
                f"{self.adapts}: its weight is a residual, so one adapter at its own scale can be merged into it, not "
                f'{wanted}; activate one with set_adapter, or adapt with placement="offset"'
            )
        layer: Any = super()
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `update_layer`, which makes a new adapter, unless that would change the weight under the others."""
        config = kwargs.get("config", next((a for a in args if hasattr(a, "init_lora_weights")), None))
        how = getattr(config, "init_lora_weights", True)
        if how not in PRESERVING_INITIALISATIONS:
            raise PissaError(
                f"{self.adapts}: init_lora_weights={how!r} of adapter {adapter_name!r} would change the weight under "
                "the adapters that are there; leave it out"
            )
        layer: Any = super()
        layer.update_layer(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's `delete_adapter`; the initial adapter stays."""
        refuse_initial(adapter_name)
        layer: Any = super()
        layer.delete_adapter(adapter_name)
        self.started.discard(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's `set_adapter`; the initial adapter is never trained."""
        layer: Any = super()
        layer.set_adapter(adapter_names, inference_mode=inference_mode)
        layer.set_requires_grad(INITIAL, False)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """PEFT's `reset_lora_parameters`, for new adapters only."""
        if self.start_scale is not None and adapter_name in (*self.started, INITIAL):
            raise PissaError(
                f"{self.adapts}: adapter {adapter_name!r} starts at the principal components, and its weight is what "
                "is left of the base; call pissa.restore and pissa.adapt to begin anew"
            )
        layer: Any = super()
        layer.reset_lora_parameters(adapter_name, init_lora_weights)

    def supports_lora_conversion(self, adapter_name: str = TRAINABLE) -> bool:
        """Whether PEFT's `convert_to_lora` can make a LoRA for the base of an adapter."""
        if self.start_scale is not None:
            raise PissaError(
                f"adapter {adapter_name!r} fits this residual alone, and so would what PEFT makes of it; "
                "pissa.export_lora(model, rank=…) makes a LoRA for the base"
            )
        layer: Any = super()
        return layer.supports_lora_conversion(adapter_name)

    @property
    def weight(self) -> Tensor:
        """What the weight is like, without its values."""
        runtime: Any = self
        weight = LoraLayer.weight.fget(runtime)  # pyright: ignore[reportOptionalCall]
        held = runtime.__dict__.get(SHOWN)
        if held is None or held[0] is not weight or held[1].requires_grad != weight.requires_grad:
            held = runtime.__dict__[SHOWN] = weight, _like(self.adapts, weight)
        return held[1]

    def _base_rows(self, rows: Sequence[str]) -> list[str]:
        """The adapter of each row of a batch, with the initial one for the base's."""
        runtime: Any = self
        for row in {*rows} & {*runtime.scaling} - {INITIAL}:
            if row not in self.started or runtime.scaling[row] != self.start_scale:
                raise PissaError(
                    f"{self.adapts}: rows of a batch take adapters that start at the base, at their own scale; {row!r} "
                    "is none. Run its rows by themselves"
                )
        return [row if row in self.started else INITIAL for row in rows]

    @contextmanager
    def _start_added(self, share: float) -> Iterator[None]:
        """Inside, the initial adapter is active as well, with this share of its scale."""
        runtime: Any = self
        active = [] if runtime.disable_adapters else [a for a in runtime.active_adapters if a != INITIAL]
        held = runtime._disable_adapters, runtime._active_adapter, runtime.scaling
        if share != 1.0 and any(runtime.use_dora.get(adapter) for adapter in active):
            raise PissaError(
                f"{self.adapts}: DoRA's adapters can be neither scaled nor added up on residuals; export them with "
                "pissa.export_lora and load them on the base"
            )
        runtime._disable_adapters, runtime._active_adapter = False, [*active, INITIAL]
        runtime.scaling = {**runtime.scaling, INITIAL: share * (self.start_scale or 0.0)}
        inner = _switched_together(runtime)
        if inner is not None:
            before = inner._disable_adapters, inner._active_adapter
            inner._disable_adapters, inner._active_adapter = False, runtime._active_adapter
        try:
            yield
        finally:
            runtime._disable_adapters, runtime._active_adapter, runtime.scaling = held
            if inner is not None:
                inner._disable_adapters, inner._active_adapter = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        runtime: Any = self
        return _made_again, (_peft_class(type(self)),), {k: v for k, v in runtime.__dict__.items() if k != SHOWN}


def adapt_layer(layer: LoraLayer, name: str) -> None:
    """Give one of PEFT's layers the class that is described above.

    Args:
        layer: it keeps its state.
        name: of what it adapts, for messages.
    """
    runtime: Any = layer
    runtime.adapts, runtime.start_scale = name, layer.scaling.get(INITIAL)
    runtime.started = {TRAINABLE} & {*layer.scaling} if INITIAL in layer.scaling else set()
    runtime.__class__ = _adapted(type(layer))


def refuse_initial(names: str | Sequence[str]) -> None:
    """Refuse to delete or train the initial adapter."""
    if INITIAL in ([names] if isinstance(names, str) else names):
        raise PissaError(
            f"{INITIAL} is what makes the base out of the residual, and stays as it is; for the base's function use "
            "disable_adapter() or pissa.reference(model)"
        )


def _switched_together(layer: Any) -> Any:
    """The layer inside an attention's that PEFT wants in the same state; None for any other kind."""
    return layer.get_base_layer().out_proj if isinstance(layer, MultiheadAttention) else None


@cache
def _adapted(cls: type) -> type:
    if issubclass(cls, AdaptedLayer):
        return cls
    own: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    if issubclass(cls, MultiheadAttention):
        own["in_proj_weight"] = property(lambda self: _like(self.adapts, self.get_base_layer().in_proj_weight))
    return type(cls.__name__, (AdaptedLayer, cls), own)


def _peft_class(cls: type) -> type:
    return next(c for c in cls.__mro__ if issubclass(c, LoraLayer) and not issubclass(c, AdaptedLayer))


def _made_again(cls: type) -> Any:
    """An empty layer, as unpickling and copying want it."""
    adapted: Any = _adapted(cls)
    return adapted.__new__(adapted)


class _NotToBeRead(Tensor):
    """A tensor with shape, dtype and device, and no values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = next((a for a in (*args, *(kwargs or {}).values(), *_inside(args)) if isinstance(a, cls)), None)
        name = getattr(read, "layer_name", "a layer")
        raise TargetError(
            f"the model's code reads the weight of {name} without calling the layer, so an adapter there would be "
            "passed by; name it in exclude_modules"
        )


def _inside(args: Any) -> Iterator[Any]:
    for argument in args:
        if isinstance(argument, list | tuple):
            yield from argument


def _like(name: str, weight: Tensor) -> Tensor:
    found: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
        _NotToBeRead,
        weight.shape,
        strides=weight.stride(),
        dtype=weight.dtype,
        device=weight.device,
        requires_grad=weight.requires_grad,
    )
    found.layer_name = name
    if isinstance(weight, nn.Parameter):
        found._is_param = True
    return found
