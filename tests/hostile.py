"""Matrices on which numerical code fails, and other processors' rounding without other processors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Half a unit in the last place of 1."""
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.addmm_.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.baddbmm_.default: (1, 2, 0),
}
"""Operation -> which arguments are the factors, and which is added to."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hilbert(m: int, n: int) -> Tensor:
    """`1 / (i + j + 1)`: condition numbers far beyond fp64's reach."""
    return (1 / (torch.arange(m)[:, None] + torch.arange(n)[None] + 1).double()).float()


def kahan(m: int, n: int, angle: float = 1.2) -> Tensor:
    """Kahan's triangle, whose near-dependence no pivot of QR shows."""
    k = min(m, n)
    s, c = torch.sin(torch.tensor(angle)).double(), torch.cos(torch.tensor(angle)).double()
    upper = torch.diag(s ** torch.arange(k)) @ (torch.eye(k).double() - c * torch.ones(k, k).double().triu(1))
    out = torch.zeros(m, n)
    out[:k, :k] = upper.float()
    return out


def hostile_matrices(m: int, n: int) -> dict[str, Tensor]:
    """(m, n) fp32 by name."""
    one_hot = torch.zeros(m, n)
    one_hot[torch.arange(n) % m, torch.arange(n)] = 1.0
    repeated = noise(m, n)
    repeated[:, n // 2 :] = repeated[:, : n - n // 2].clone()
    decades = 10.0 ** torch.linspace(-30, 30, n)
    tiny_column, zero_column = noise(m, n), noise(m, n)
    tiny_column[:, n // 3] *= 1e-12
    zero_column[:, n // 3] = 0
    single = torch.zeros(m, n)
    single[m // 2, n // 2] = 3.0
    return {
        "random": noise(m, n),
        "zero": torch.zeros(m, n),
        "ones": torch.ones(m, n),
        "ones and a little": 1 + 1e-7 * noise(m, n),
        "one-hot": one_hot,
        "a single entry": single,
        "repeated columns": repeated,
        "repeated rows": repeated[:1].expand(m, n).clone(),
        "sixty decades": noise(m, n) * decades,
        "sixty decades of rows": noise(m, n) * 10.0 ** torch.linspace(-30, 30, m)[:, None],
        "hilbert": hilbert(m, n),
        "kahan": kahan(m, n),
        "a tiny column": tiny_column,
        "a zero column": zero_column,
        "denormal": noise(m, n) * 1e-40,
        "huge": noise(m, n).clamp(-4, 4) * 1e30,
        "tiny": noise(m, n) * 1e-30,
        "alternating": torch.ones(m, n) * (1 - 2 * (torch.arange(m)[:, None] % 2)),
        "rank one and rounding": torch.outer(noise(m), noise(n)) + 1e-7 * noise(m, n, seed=1),
    }


class OtherRounding(TorchDispatchMode):
    """Every matrix product and triangular solve off by as much as another library's order of summation may leave it.

    The error of an entry is a unit in the last place of `|A|·|B|`, which no implementation undercuts by much: a
    random one each time, or ("up", "down") always the same, the kind that does not average out.
    """

    def __init__(self, kind: str = "random", seed: int = 0) -> None:
        super().__init__()
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.linalg_solve_triangular.default:
            # a backward error, as every stable solver leaves one: that of a slightly different right-hand side
            A, B = args
            return func(A, B + self.errors(B.abs(), alternating=True), **kwargs)
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        left, right, base = PRODUCTS[func]
        size = args[left].abs() @ args[right].abs()
        size = size if base is None else size + args[base].abs()
        return func(*args, **kwargs).add_(self.errors(size))

    def errors(self, size: Tensor, *, alternating: bool = False) -> Tensor:
        """Half a unit in the last place of each entry, with a sign, or a random share of it."""
        if self.kind == "random":
            signs = 2 * torch.rand(size.shape, generator=self.generator).to(size.dtype) - 1
        else:
            signs = torch.ones_like(size) if self.kind == "up" else -torch.ones_like(size)
            if alternating:
                signs[..., ::2] *= -1
        return size * UNIT.get(size.dtype, 0.0) * signs
