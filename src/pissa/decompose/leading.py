"""The first triplets of an SVD that has more of them, and what its certificate says about those.

    best_r − captured_r = Σ_{i ≤ r} (σᵢ² − θᵢ²) ≤ Σ_{i ≤ k} (σᵢ² − θᵢ²) = best_k − captured_k          r ≤ k

Every term is nonnegative, because Ritz values never exceed the singular values that they approximate (Cauchy). So the
energy that all k triplets may miss bounds what the first r may miss. Against the smaller energy of r triplets it may
weigh more than the tolerance allows; then two products with W, started from the triplets at hand, refresh them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .certificate import Certificate
from .svd import TruncatedSVD, decompose


def leading_triplets(
    found: TruncatedSVD, W: Tensor, rank: int, tolerance: float, seed: int, largest: float | None = None
) -> TruncatedSVD:
    """The r largest singular triplets of W from an SVD of at least r.

    Args:
        found: of W (m, n), k ≥ r triplets.
        W: (m, n), looked at only where the certificate does not reach the tolerance.
        rank: r.
        tolerance: the captured-energy loss to aim for.
        seed: of the probes that a refresh adds.
        largest: W's largest magnitude where it is known.

    Returns:
        U (m, r), S (r,), Vh (r, n) and their own certificate; the triplets of `found` themselves where it suffices.
    """
    certificate: Certificate = found.certificate
    first = TruncatedSVD(found.U[:, :rank], found.S[:rank], found.Vh[:rank], certificate)
    loss = loss_of_the_first(found, rank)
    if loss > max(tolerance, certificate.captured_energy_loss) and rank < len(found.S):
        warm = found.Vh.mT if W.shape[0] >= W.shape[1] else found.U
        return decompose(W, rank, tolerance, "auto", seed, warm, largest=largest)
    return first._replace(certificate=replace(certificate, captured_energy_loss=loss))


def loss_of_the_first(found: TruncatedSVD, rank: int) -> float:
    """A bound on the captured-energy loss of the first `rank` triplets."""
    energies = found.S.double()
    energies = (energies / energies[:1].clamp_min(1e-300)).square()
    loss, captured = found.certificate.captured_energy_loss, float(energies[:rank].sum())
    if rank == len(energies) or captured == 0 or loss >= 1:
        return loss
    missed = float(energies.sum()) * loss / (1 - loss)
    return missed / (captured + missed)
