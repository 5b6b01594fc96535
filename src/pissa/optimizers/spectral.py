"""Spectral descent on the product s·B·A: every step changes each adapted weight by the learning rate, in spectral norm.

Adam moves each entry of A and B by about the learning rate, so the change of the weight grows with the factors' norms,
with the rank and with the scale: that is why its best rate is another one for LoRA, for PiSSA and for every rank. Here
the learning rate IS the length of the weight's change (`product.py`), with one moment, Nesterov's, as state:

    m ← μ·m + g        G = g + μ·m        (A, B) ← (A, B) − η/s · direction(A, B, G)

What belongs to no product (DoRA's magnitudes, modules in full, rows of embeddings) is moved by AdamW, at a rate of its
own that is a fixed part of η. Clipping a gradient does not shorten a step: it lowers the weight of that gradient in m,
which is the use of it here. Weight decay shrinks the product, by η·λ a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..errors import ConfigError, PissaError, TrainingError
from .default_rates import RATES, SPECTRAL
from .pairs import Pair, trained_pairs
from .product import DAMPING, direction

OTHERS = 0.01
"""AdamW's rate of what belongs to no product, over the learning rate."""
CHUNK = 1 << 24
"""Values of factors that are moved at once, which bounds the memory of a step."""


class SpectralProduct(Optimizer):
    """Moves every product B·A of a PEFT model by a step of one spectral norm, whatever start, rank and alpha it has.

    Args:
        model: a PEFT model with trained LoRA factors in fp32, adapted by pissa or not, in DistributedDataParallel or
            not; under FSDP2 after `fully_shard`.
        lr: η, the spectral norm by which a step changes each adapted weight.
        momentum: μ, in [0, 1).
        damping: see `direction`.
        weight_decay: share of the product, times η, that is taken off at each step; AdamW's for what is no product and
            has more than one dimension.
        others: AdamW's rate over η, for what belongs to no product.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ConfigError: a setting out of its range, or a model without pairs of factors, or with some that are not fp32.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, SpectralProduct, adapt
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> optimizer = SpectralProduct(model)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(
        self,
        model: Any,
        lr: float = RATES[SPECTRAL],
        *,
        momentum: float = 0.9,
        damping: float = DAMPING,
        weight_decay: float = 0.0,
        others: float = OTHERS,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        ranges = {
            "lr": (lr >= 0, "at least 0"),
            "momentum": (0 <= momentum < 1, "at least 0 and below 1"),
            "damping": (damping >= 0, "at least 0"),
            "weight_decay": (weight_decay >= 0, "at least 0"),
            "others": (others >= 0, "at least 0"),
        }
        if wrong := [f"{name} must be {words}" for name, (right, words) in ranges.items() if not right]:
            raise ConfigError("; ".join(wrong))
        trained = trained_pairs(model)
        low = [pair.name for pair, A in zip(trained.pairs, trained.factors[::2], strict=True) if _is_low(A)]
        if low:
            raise ConfigError(
                f"{len(low)} adapters, {low[0]} first, are in less than fp32, which would round small steps away: "
                "keep them in fp32, as pissa and PEFT (autocast_adapter_dtype) do"
            )
        own = {"momentum": momentum, "damping": damping, "weight_decay": weight_decay}
        pairs = [asdict(pair) for pair in trained.pairs]
        groups: list[dict[str, Any]] = [{"params": trained.factors, "pairs": pairs, "lr": lr, **own}]
        for decayed in (True, False):
            held = [p for p in trained.others.values() if (p.ndim > 1) is decayed]
            decay = {"weight_decay": weight_decay if decayed else 0.0}
            if held:
                groups.append({"params": held, "lr": others * lr, "betas": betas, "eps": eps, **decay})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move everything that has a gradient.

        Raises:
            TrainingError: a gradient that is not finite, by name, before anything has moved.
            PissaError: parameters that were flattened or cut, as FSDP1 and DeepSpeed's ZeRO do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._move_products if "pairs" in group else self._move_others)(group)
        return loss

    def _move_products(self, group: dict[str, Any]) -> None:
        factors = group["params"]
        found = [
            (Pair(**pair), A, B)
            for pair, A, B in zip(group["pairs"], factors[::2], factors[1::2], strict=True)
            if A.grad is not None or B.grad is not None
        ]
        _check_whole(found)
        _check_finite(found)
        for chunk in _chunks(found):
            self._move_alike(chunk, group)

    def _move_alike(self, pairs: list[tuple[Pair, nn.Parameter, nn.Parameter]], group: dict[str, Any]) -> None:
        """One step of pairs whose factors are alike in shape."""
        values = [pair.matrices(_whole(A), _whole(B)) for pair, A, B in pairs]
        moments = [
            pair.matrices(self._average(A, group["momentum"]), self._average(B, group["momentum"]))
            for pair, A, B in pairs
        ]
        A, B, G_A, G_B = (torch.cat([each[side] for each in listed]) for listed in (values, moments) for side in (0, 1))
        found = direction(A, B, G_A, G_B, group["damping"])
        kept = max(1 - group["lr"] * group["weight_decay"], 0.0) ** 0.5
        stacked = len(values[0][0])
        for place, (pair, *parameters) in enumerate(pairs):
            part = slice(place * stacked, (place + 1) * stacked)
            length = group["lr"] / pair.scale
            dA, dB = A[part] * (kept - 1) - found.D_A[part] * length, B[part] * (kept - 1) - found.D_B[part] * length
            for parameter, change in zip(parameters, pair.stored(dA, dB, parameters), strict=True):
                parameter.add_(_spread(change, parameter))

    def _average(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient, averaged with those before, a step ahead (Nesterov)."""
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        state = self.state[parameter]
        if "moment" not in state:
            state["moment"] = torch.zeros_like(parameter)
        moment = state["moment"].mul_(momentum).add_(gradient)
        return _whole(gradient + momentum * moment)

    def _move_others(self, group: dict[str, Any]) -> None:
        moved = [p for p in group["params"] if p.grad is not None]
        for parameter in moved:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                self.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        adamw(
            moved,
            [p.grad for p in moved if p.grad is not None],
            [self.state[p]["exp_avg"] for p in moved],
            [self.state[p]["exp_avg_sq"] for p in moved],
            [],
            [self.state[p]["step"] for p in moved],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _is_low(parameter: Tensor) -> bool:
    return parameter.dtype not in (torch.float32, torch.float64)


def _chunks(
    pairs: list[tuple[Pair, nn.Parameter, nn.Parameter]],
) -> Iterator[list[tuple[Pair, nn.Parameter, nn.Parameter]]]:
    """The pairs in parts that are alike and no larger than CHUNK."""
    alike: dict[Any, list[tuple[Pair, nn.Parameter, nn.Parameter]]] = {}
    for entry in pairs:
        pair, A, B = entry
        alike.setdefault((A.shape, B.shape, A.device, A.dtype, pair.kind, pair.rank, pair.halved), []).append(entry)
    for entries in alike.values():
        size = max(1, CHUNK // (entries[0][1].numel() + entries[0][2].numel()))
        for start in range(0, len(entries), size):
            yield entries[start : start + size]


def _check_whole(pairs: list[tuple[Pair, nn.Parameter, nn.Parameter]]) -> None:
    wrong = [pair.name for pair, A, B in pairs if A.ndim < 2 or B.ndim < 2 or A.shape[0] % pair.rank or not A.numel()]
    if wrong:
        raise PissaError(
            f"the factors of {wrong[0]} were flattened or cut in pieces, as FSDP1 and DeepSpeed do: this optimizer "
            "needs whole matrices; take FSDP2 or DDP, or AdamW"
        )


def _check_finite(pairs: list[tuple[Pair, nn.Parameter, nn.Parameter]]) -> None:
    named = [(pair.name, _local(p.grad)) for pair, *both in pairs for p in both if p.grad is not None]
    named = [(name, gradient) for name, gradient in named if gradient.numel()]
    if not named:
        return
    device = named[0][1].device
    finite = torch.stack([gradient.abs().amax().double().to(device) for _, gradient in named]).isfinite()
    if not finite.all():
        wrong = list(dict.fromkeys(name for (name, _), right in zip(named, finite.tolist(), strict=True) if not right))
        more = f" (and of {len(wrong) - 1} more adapters)" if len(wrong) > 1 else ""
        raise TrainingError(
            f"the gradient of {wrong[0]} is not finite{more}; nothing was moved: lower the learning rate, or look at "
            "the data of this step"
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds whole, sharded as another one is."""
    if not isinstance(like, DTensor):
        return whole
    copies = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole, like.device_mesh, copies, run_check=False).redistribute(placements=like.placements)
