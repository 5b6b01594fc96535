"""Block Golub-Kahan bidiagonalisation with full reorthogonalisation: randomized block Krylov, one block at a time.

    U_j = orth(W V_j),  V_{j+1} = orth(Wᵀ U_j)        each new block kept orthogonal to all earlier ones

After j blocks of b columns the bases span `{(WᵀW)^i V_1, i ≤ j}`: every polynomial of degree j in WᵀW, where
subspace iteration has one monomial. That is what makes block Krylov reach a given loss in far fewer products with W
(Musco and Musco, arXiv 1504.05477). The products are not repeated for the projection: `Wᵀ U = V Tᵀ` holds by
construction, so the coefficients of the orthogonalisation ARE the projected matrix T, and the triplets and the
certificate come from a K × (K + b) core (`ritz.py`).

Blocks narrower than the rank are on purpose. With K = j·b columns in all, the cost is that of K columns whatever b,
but the polynomial degree grows as K / b (Meyer, Musco and Musco, arXiv 2305.02535): on weight matrices b = 32 reaches
a loss of 1e-3 with about 3r columns, b = r + 8 needs 5r and more. What narrow blocks cannot see is a singular value
that is repeated more than b times. Two guards handle that: a block whose columns become dependent is refilled with
random ones (`orthogonal.py`), and when b neighbouring Ritz values coincide, random columns are added to the next
block; after either, two more blocks must pass before a certificate is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .orthogonal import orthonormalize
from .ritz import Factorization, Spectrum, certify, repeated_energy, ritz_triplets

WIDEST = 48
"""Columns of the widest block; wider ones gain no speed and lose polynomial degree."""
EXHAUSTED = 1e-5
"""New directions weaker than this, against the norm of W, are rounding noise."""
FP32_CHECKS = 1e-4
"""Tolerances from here on are checked with fp32 eigenvalues, at half the time."""
GROWTH, GROWTH_LARGE, LARGE = 0.7, 0.4, 2048**2
"""Share of the predicted distance to the tolerance that is walked before the next check: less for matrices with so
many entries that a block costs more than a check."""
MATURE = 2
"""Blocks that must follow random columns before a certificate."""


def block_width(rank: int) -> int:
    """Columns of a block: narrow for a high polynomial degree, wide for the speed of the products."""
    return min(WIDEST, max(16, rank // 2))


class Columns:
    """An orthonormal basis (..., n, k) in a buffer that grows by doubling."""

    def __init__(self, like: Tensor, rows: int, capacity: int) -> None:
        self.buffer = like.new_empty((*like.shape[:-2], rows, capacity), dtype=torch.float32)
        self.count = 0

    @property
    def filled(self) -> Tensor:
        return self.buffer[..., : self.count]

    def append(self, block: Tensor) -> Tensor:
        """Add columns; returns them as a view of the buffer."""
        end = self.count + block.shape[-1]
        if end > self.buffer.shape[-1]:
            grown = self.buffer.new_empty((*self.buffer.shape[:-1], max(end, 2 * self.buffer.shape[-1])))
            grown[..., : self.count] = self.filled
            self.buffer = grown
        self.buffer[..., self.count : end] = block
        self.count = end
        return self.buffer[..., end - block.shape[-1] : end]


class GolubKahan:
    """The state of a bidiagonalisation of W (..., m, n), m ≥ n: bases U, V and the core T = UᵀWV.

    Args:
        W: (..., m, n) fp32, finite, m ≥ n.
        start: (..., n, b) fp32 first block, any columns; random ones replace dependent ones. Overwritten.
        generator: for replacements, on W's device.
        capacity: expected number of columns.
    """

    def __init__(self, W: Tensor, start: Tensor, generator: torch.Generator, capacity: int) -> None:
        m, n = W.shape[-2:]
        self.W, self.generator, self.passes = W, generator, 0
        self.V = Columns(W, n, min(n, capacity + start.shape[-1]))
        self.U = Columns(W, m, min(n, capacity))
        self.rows: list[Tensor] = []
        self.young = 0
        block, _, _ = orthonormalize(start, None, generator)
        self.newest = self.V.append(block)

    @property
    def complete(self) -> bool:
        """Whether U holds the whole range of W, so that nothing is left to find."""
        return self.U.count >= self.W.shape[-1]

    def advance(self, extra: int = 0) -> None:
        """One block more in each basis: two products with W. `extra` random columns widen the next block."""
        Y = self.W @ self.newest
        Q, _, _ = orthonormalize(Y, self.U.filled if self.U.count else None, self.generator)
        Z = self.W.mT @ self.U.append(Q)
        self.passes += 2
        self.young = max(0, self.young - 1)
        self._extend_right(Z, extra)

    def _extend_right(self, Z: Tensor, extra: int) -> None:
        n, b = Z.shape[-2:]
        width = min(b, n - self.V.count)
        basis = self.V.filled
        if width == 0:
            self.rows.append((basis.mT @ Z).mT)
            self.newest = basis[..., :0]
            return
        if width < b:
            # The last directions of the space: any orthonormal basis of them will do.
            Q, _, _ = orthonormalize(self._random(Z, width), basis, self.generator)
            self.newest = self.V.append(Q)
            self.rows.append((self.V.filled.mT @ Z).mT)
            return
        Q, C, R = orthonormalize(Z, basis, self.generator)
        assert C is not None
        self.newest = self.V.append(Q)
        row = torch.cat([C, R], -2).mT
        self.rows.append(row)
        scale = torch.linalg.vector_norm(row, dim=(-2, -1))
        weakest = torch.linalg.vector_norm(R, dim=-1).amin(-1)
        if bool((weakest <= EXHAUSTED * scale).any()):
            self.young = MATURE
        extra = min(extra, n - self.V.count)
        if extra > 0:
            Q, _, _ = orthonormalize(self._random(Z, extra), self.V.filled, self.generator)
            self.V.append(Q)
            self.newest = self.V.filled[..., -(b + extra) :]
            self.young = MATURE

    def _random(self, like: Tensor, width: int) -> Tensor:
        shape = (*like.shape[:-1], width)
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=self.generator)

    def core(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """T (..., K, L)."""
        T = self.W.new_zeros((*self.W.shape[:-2], self.U.count, self.V.count), dtype=dtype)
        top = 0
        for row in self.rows:
            T[..., top : top + row.shape[-2], : row.shape[-1]] = row
            top += row.shape[-2]
        return T

    def certify(self, rank: int, total: Tensor, tolerance: float = 0.0) -> Spectrum:
        """What the best `rank` triplets of the bases so far may have missed."""
        complement = self.W.shape[-1] - self.U.count
        dtype = torch.float32 if tolerance >= FP32_CHECKS else torch.float64
        last = self.rows[-1].shape[-2]
        return certify(self.core(dtype), rank, last, self.newest.shape[-1], total, complement)

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., m, r), S (..., r), Vh (..., r, n), fp32."""
        ritz = ritz_triplets(self.core(), rank)
        U = self.U.filled @ ritz.left.float()
        Vh = ritz.right.float().mT @ self.V.filled.mT
        return U, ritz.values.float(), Vh


def block_krylov(
    W: Tensor,
    rank: int,
    tolerance: float,
    start: Tensor,
    generator: torch.Generator,
    total: Tensor,
) -> Factorization:
    """Grow a Golub-Kahan bidiagonalisation until its certified captured-energy loss is at most `tolerance`.

    Args:
        W: (..., m, n) fp32, finite, m ≥ n.
        rank: r ≤ n.
        tolerance: for every matrix of the batch.
        start: (..., n, b) first block; a warm start is a good one. Overwritten.
        generator: on W's device.
        total: (...,) fp64, ‖W‖².

    Returns:
        The triplets, at most min(m, n) columns having been spent on them.
    """
    b = start.shape[-1]
    growth = GROWTH_LARGE if W.shape[-2] * W.shape[-1] >= LARGE else GROWTH
    state = GolubKahan(W, start, generator, capacity=3 * rank + b)
    goal, previous, extra = max(rank, b if b >= rank else 2 * rank), None, 0
    while True:
        while not state.complete and (state.U.count < goal or state.young):
            state.advance(extra)
            extra = 0
        spectrum = state.certify(rank, total, tolerance)
        worst = float(spectrum.loss.max())
        exhausted = float(spectrum.missed.max()) < ROUNDING_SHARE
        if state.complete or exhausted:
            break
        width = state.newest.shape[-1]
        if width < rank and bool((repeated_energy(spectrum.energies, rank, width) > 0).any()):
            goal, extra = state.U.count + 1, width
            continue
        if len(state.rows) == 1 and is_flat(spectrum.energies, rank):
            goal = state.U.count + 1
            continue
        if worst <= tolerance:
            break
        goal, previous = next_goal(state.U.count, worst, previous, tolerance, rank, growth)
    U, S, Vh = state.triplets(rank)
    return Factorization(U, S, Vh, spectrum.loss, state.passes, "upper bound" if state.complete else "estimate")


FLAT = 0.02
"""Relative fall of the energies beyond the wanted ones that a block which was handed in has to show."""
ROUNDING_SHARE = 1e-7
"""Share of ‖W‖² below which what the bases miss is rounding."""


def is_flat(energies: Tensor, rank: int) -> bool:
    """Whether the Ritz values of a single block hardly fall beyond the wanted ones.

    Then others like them may lie outside, which one step does not tell from those inside.
    """
    beyond, wanted = energies[..., -1], energies[..., rank - 1]
    return energies.shape[-1] > rank and bool((beyond > (1 - FLAT) * wanted).any())


def next_goal(
    columns: int, loss: float, previous: tuple[int, float] | None, tolerance: float, rank: int, growth: float
) -> tuple[int, tuple[int, float]]:
    """At how many columns to look again: extrapolates the loss, which falls at least geometrically."""
    decades = torch.log10(torch.tensor(loss / max(tolerance, ROUNDING_SHARE))).item()
    slope = 1.4 / rank
    if previous is not None and columns > previous[0] and loss < previous[1]:
        measured = torch.log10(torch.tensor(previous[1] / loss)).item() / (columns - previous[0])
        slope = max(measured, 0.5 * slope)
    return columns + max(1, int(growth * max(decades, 0.0) / slope)), (columns, loss)
