"""Products in bf16 where the processor has units for them: the same answers, honest certificates, never by a clock."""

from __future__ import annotations

import pytest
import torch
from spectra import deviation_from_identity, energy_loss, optimal_energy, spectra, with_spectrum, zoo

from hostile import hostile_matrices
from pissa.config import PissaConfig
from pissa.decompose import units
from pissa.decompose.sketch import sketched_start
from pissa.decompose.svd import decompose, truncated_svd
from pissa.decompose.units import first_products, has_bf16_units
from pissa.errors import ConfigError
from pissa.split import split_weight

CPU = torch.device("cpu")
OPTIMISM, ROUNDING = 2.0, 2e-6
"""As in test_certificate.py."""


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_PRODUCTS", "bf16")


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(
    ("rank", "turn"),
    [(5, 0), (24, 1), pytest.param(5, None, marks=pytest.mark.slow), pytest.param(24, None, marks=pytest.mark.slow)],
)
def test_certificates_are_honest_and_tolerances_are_met(rank: int, turn: int | None) -> None:
    for name, W in zoo(range(1), turn):
        best = optimal_energy(W, rank)
        for tolerance in (1e-2, 1e-3, 1e-4):
            U, S, Vh, certificate = truncated_svd(W, rank, algorithm="krylov", tolerance=tolerance)
            loss = energy_loss(W, U, S, Vh, best)
            assert loss <= OPTIMISM * certificate.captured_energy_loss + ROUNDING, f"{name} rank {rank} {tolerance}"
            assert certificate.captured_energy_loss <= tolerance
            assert deviation_from_identity(U) < 1e-5 and deviation_from_identity(Vh.mT) < 1e-5


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("name", hostile_matrices(70, 50))
def test_every_matrix_is_decomposed(name: str) -> None:
    W = hostile_matrices(70, 50)[name]
    for each in (W, W.mT):
        for rank in (1, 12, 50):
            U, S, Vh, _ = truncated_svd(each, rank, algorithm="krylov")
            assert deviation_from_identity(U) < 1e-5 and deviation_from_identity(Vh.mT) < 1e-5
            exact = torch.linalg.svdvals(each.double())[:rank]
            assert float((S.double() - exact).abs().max()) <= 1e-2 * float(exact[0])


@pytest.mark.usefixtures("bf16")
def test_bits_are_fixed_by_the_seed_and_the_global_generator_is_left_alone() -> None:
    W = with_spectrum(spectra(80)["1/sqrt(i)"], 100, 80)
    before = torch.get_rng_state()
    first, second = (truncated_svd(W, 10, algorithm="krylov", seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert not torch.equal(first.U, truncated_svd(W, 10, algorithm="krylov", seed=4).U)


@pytest.mark.usefixtures("bf16")
def test_a_split_still_reconstructs_its_weight_to_fp32_rounding() -> None:
    W = with_spectrum(spectra(80)["1/sqrt(i)"], 100, 80)
    split = split_weight(W, PissaConfig(10, algorithm="krylov"))
    assert split.certificate.rounding < 1e-6
    torch.testing.assert_close(split.restore(), W, rtol=0, atol=1e-6)


def test_on_a_decaying_spectrum_one_step_in_fp32_follows() -> None:
    W = with_spectrum(spectra(300)["1/i"], 400, 300).bfloat16()
    low = decompose(W, 32, 1e-3, "krylov", 0, sketch=torch.bfloat16)
    start = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    subspace, passes = sketched_start(W.float(), 32, start, torch.Generator().manual_seed(0), torch.bfloat16)
    assert low.certificate.passes == passes + 2
    assert subspace.shape == (300, 48) and deviation_from_identity(subspace) < 1e-5
    assert energy_loss(W, low.U, low.S, low.Vh) <= 1e-4


def test_the_choice_is_the_processor_s_the_environment_s_or_nobody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISSA_PRODUCTS", raising=False)
    monkeypatch.setattr(units, "has_bf16_units", lambda: True)
    assert first_products(CPU, 1e-3) == torch.bfloat16
    assert first_products(CPU, 1e-5) == torch.float32
    assert first_products(torch.device("cuda"), 1e-3) == torch.float32
    monkeypatch.setattr(units, "has_bf16_units", lambda: False)
    assert first_products(CPU, 1e-3) == torch.float32
    monkeypatch.setenv("PISSA_PRODUCTS", "bf16")
    assert first_products(torch.device("cuda"), 1e-3) == torch.bfloat16
    monkeypatch.setenv("PISSA_PRODUCTS", "fp8")
    with pytest.raises(ConfigError, match="fp32, bf16"):
        first_products(CPU, 1e-3)


@pytest.mark.parametrize(
    ("flags", "limit", "expected"),
    [
        ({"avx512_bf16": True}, "", True),
        ({"amx_bf16": True}, "", True),
        ({"avx512_bf16": True}, "AVX512_CORE", False),
        ({"avx512_bf16": True}, "AVX512_CORE_BF16", True),
        ({"avx2": True, "avx512_f": True}, "", False),
        ({}, "", False),
    ],
)
def test_units_are_known_by_the_processor_s_flags(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], limit: str, expected: bool
) -> None:
    monkeypatch.setattr(units, "processor_flags", lambda: flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    has_bf16_units.cache_clear()
    try:
        assert has_bf16_units() is expected
    finally:
        has_bf16_units.cache_clear()


def test_this_processor_s_flags_can_be_read() -> None:
    assert all(isinstance(value, bool) for value in units.processor_flags().values())
