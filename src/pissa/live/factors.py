"""One weight's adapter as plain tensors, and the arithmetic on it.

What training changed is, per weight,

    ΔW = s · (B·A − B0·A0) = s · [B | −B0] · [A ; A0]

with the trained factors A, B and the initial ones A0, B0: a plain LoRA of rank 2r for the base. Whatever loads, saves,
merges or exports an adapter moves this record; the model it came from is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..decompose.dora import rescaled
from .layers import ATTENTION, EMBEDDING, Kind, combine_each
from .runtime import OUT_PROJ, with_holes

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name for DoRA's magnitudes."""
WRAPPED = ".base_layer"
"""The ending of a path inside one of PEFT's wrappers."""


@dataclass(frozen=True)
class AdapterFactors:
    """One weight's adapter, or that of a stack of experts, which is the leading dimension then. For a LoRA baseline,
    whose initial product is zero, A0 and B0 are None."""

    A: Tensor
    """(…, r, in)."""
    B: Tensor
    """(…, out, r)."""
    scale: float
    A0: Tensor | None = None
    """(…, r, in): A at step 0."""
    B0: Tensor | None = None
    """(…, out, r): B at step 0."""
    magnitude: Tensor | None = None
    """(out,): of DoRA, the norms of the adapted weight's rows; else None."""
    E: Tensor | None = None
    """(r,): of AdaLoRA, the values between B and A; else None."""
    E0: Tensor | None = None
    """(r,): E at step 0."""

    def folded(self) -> AdapterFactors:
        """The same adapter without a vector of its own between the factors: B·diag(E) for B."""
        if self.E is None:
            return self
        B0 = self.B0 * self.E0 if self.B0 is not None and self.E0 is not None else None
        return replace(self, B=self.B * self.E, B0=B0, E=None, E0=None)

    def change(self) -> AdapterFactors:
        """`ΔW = s·B·A` in one pair of factors: A is [A ; A0] (…, 2r, in), B is [B | −B0] (…, out, 2r), E is [E ; E0]
        (2r,). A LoRA baseline is that already. `halves` takes it apart again."""
        if self.A0 is None or self.B0 is None:
            return self
        A, B = torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, -self.B0], dim=-1)
        E = torch.cat([self.E, self.E0]) if self.E is not None and self.E0 is not None else None
        return AdapterFactors(A, B, self.scale, magnitude=self.magnitude, E=E)


@dataclass(frozen=True)
class Layout:
    """How PEFT stores one weight's adapter."""

    path: str
    """Of PEFT's layer in the wrapped model: the module's name, below it `base_layer` for one wrapped again."""
    kind: Kind
    shape: tuple[int, ...]
    """Of the weight as it is stored."""
    dilation: tuple[int, ...] = ()
    """Of a convolution: what the kernels in PEFT's files have holes for, see `runtime.py`."""

    @property
    def magnitude_key(self) -> str:
        """The name of DoRA's magnitudes in PEFT's files."""
        return f"{self.path}.{MAGNITUDE}"

    def keys(self, adapter: str | None = None) -> tuple[str, str]:
        """The names of A and B in PEFT's files, without their common beginning; with an adapter's name, in a model."""
        ending = "" if self.kind is EMBEDDING else ".weight"  # PEFT holds these two as bare parameters
        inserted = f".{adapter}" if adapter else ""
        A, B = (f"{self.path}.{side}{inserted}{ending}" for side in self.kind.sides)
        return A, B

    def tensors(self, A: Tensor, B: Tensor, E: Tensor | None = None) -> dict[str, Tensor]:
        """Factors A (…, r, in) and B (…, out, r), for AdaLoRA with E (r,), as PEFT's files hold them."""
        if E is not None:
            return {f"{self.path}.lora_A": A, f"{self.path}.lora_B": B, f"{self.path}.lora_E": E.reshape(-1, 1)}
        A_stored, B_stored = self.kind.pack(A, B, self.shape)
        if self.dilation:
            A_stored = with_holes(A_stored, self.dilation)
        entries = dict(zip(self.keys(), (A_stored, B_stored), strict=True))
        if self.kind is ATTENTION:
            rank, width = A.shape
            below = f"{self.path}{OUT_PROJ}.lora"
            entries |= {f"{below}_A.weight": A.new_zeros(rank, width), f"{below}_B.weight": A.new_zeros(width, rank)}
        return entries


def halves(factors: AdapterFactors) -> AdapterFactors:
    """Trained and initial factors out of `[A ; A0]` (…, 2r, in) and `[B | −B0]` (…, out, 2r), see `change`."""
    r = factors.A.shape[-2] // 2
    return AdapterFactors(
        factors.A[..., :r, :].contiguous(),
        factors.B[..., :r].contiguous(),
        factors.scale,
        factors.A[..., r:, :].contiguous(),
        -factors.B[..., r:].contiguous(),
        factors.magnitude,
        factors.E[:r] if factors.E is not None else None,
        factors.E[r:] if factors.E is not None else None,
    )


def merged_weight(W: Tensor, factors: AdapterFactors) -> Tensor:
    """A weight with its adapter in it: `W + s·B·A`, with DoRA the same with rows of the trained lengths.

    Args:
        W: (…, out, in), what the trained factors A and B are added to in training: the base's weight or the residual.
        factors: without AdaLoRA's vector (`folded`); the initial ones are not looked at, see `change`.

    Returns:
        (…, out, in) in W's dtype.
    """
    if factors.magnitude is None:
        return combine_each(W, factors.A, factors.B, factors.scale)
    return rescaled(combine_each(W.float(), factors.A, factors.B, factors.scale), factors.magnitude).to(W.dtype)
