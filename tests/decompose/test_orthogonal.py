"""Orthonormal blocks from any block, also from columns that are dependent, zero or inside the basis."""

from __future__ import annotations

import pytest
import torch
from spectra import deviation_from_identity, spectra, white_noise, with_spectrum

from pissa.decompose.orthogonal import orthonormalize


def generator():
    return torch.Generator().manual_seed(0)


def blocks():
    repeated = white_noise(200, 20)
    repeated[:, 10:] = repeated[:, :10]
    tiny = white_noise(200, 20)
    tiny[:, 3] *= 1e-12
    one_zero = white_noise(200, 20)
    one_zero[:, 5] = 0
    return {
        "random": white_noise(200, 20),
        "ill-conditioned": with_spectrum(10.0 ** -torch.linspace(0, 12, 20), 200, 20),
        "decaying": with_spectrum(spectra(20)["fast"], 200, 20),
        "repeated columns": repeated,
        "a zero column": one_zero,
        "zero": torch.zeros(200, 20),
        "a tiny column": tiny,
        "huge": white_noise(200, 20) * 1e15,
        "small": white_noise(200, 20) * 1e-15,
    }


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside the basis"])
def test_any_block_becomes_orthonormal_and_is_reproduced(name, inside):
    Y = blocks()[name]
    basis, _, _ = orthonormalize(white_noise(200, 30, seed=1), None, generator())
    if inside:
        Y = basis @ (basis.T @ Y)
    Q, C, R = orthonormalize(Y.clone(), basis, generator())
    assert C is not None
    assert deviation_from_identity(torch.cat([basis, Q], 1)) < 5e-6
    assert torch.dist(basis @ C + Q @ R, Y) <= 1e-5 * Y.norm() + 1e-30


@pytest.mark.parametrize("name", blocks())
def test_a_batch_is_its_members(name):
    Y = blocks()[name]
    Q, _, R = orthonormalize(torch.stack([Y, white_noise(200, 20, seed=3)]), None, generator())
    for i in range(2):
        assert deviation_from_identity(Q[i]) < 5e-6
    assert torch.dist(Q[0] @ R[0], Y) <= 1e-5 * Y.norm() + 1e-30


def test_the_last_directions_of_the_space_are_found():
    basis, _, _ = orthonormalize(white_noise(30, 27), None, generator())
    Q, _, _ = orthonormalize(torch.zeros(30, 3), basis, generator())
    assert deviation_from_identity(torch.cat([basis, Q], 1)) < 5e-6
