"""The front door: accuracy, hard cases, determinism and refusals, against torch's exact SVD in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import deviation_from_identity, energy_loss, optimal_energy, spectra, white_noise, with_spectrum

from pissa.config import ALGORITHMS, PissaConfig
from pissa.decompose.ritz import FP32_ROUNDING, ROUNDING
from pissa.decompose.svd import decompose, truncated_svd
from pissa.errors import ConfigError, WeightError

ITERATIVE = ("krylov", "subspace")
PROOF = 2.5e-4
"""The proof of "chebyshev" leaves a margin of about a tenth of the default tolerance however small the loss is."""


def assert_good(W, found, rank, tolerance):
    U, S, Vh, certificate = found
    m, n = W.shape
    assert U.shape == (m, rank) and S.shape == (rank,) and Vh.shape == (rank, n)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    assert deviation_from_identity(U) < 1e-5
    assert deviation_from_identity(Vh.T) < 1e-5
    assert bool((S[:-1] >= S[1:]).all()) and bool((S >= 0).all())
    provable = PROOF if certificate.algorithm == "chebyshev" else 3e-6
    assert certificate.captured_energy_loss <= max(tolerance, provable)
    assert energy_loss(W, U, S, Vh) <= max(tolerance, 3e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(150, 90), (90, 150), (120, 120)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("decay", ["1/i", "1/sqrt(i)", "fast", "slow", "spiked"])
def test_loss_stays_below_the_tolerance(algorithm, shape, decay):
    W = with_spectrum(spectra(min(shape))[decay], *shape)
    assert_good(W, truncated_svd(W, 12, algorithm=algorithm), 12, 1e-3)


@pytest.mark.parametrize("algorithm", ["auto", "gram", "krylov", "subspace"])
@pytest.mark.parametrize("decay", ["1/i", "slow"])
def test_a_loss_of_1e_6_is_reachable(algorithm, decay):
    W = with_spectrum(spectra(150)[decay], 200, 150)
    found = truncated_svd(W, 16, algorithm=algorithm, tolerance=1e-6)
    assert energy_loss(W, found.U, found.S, found.Vh) <= 1e-6
    assert found.certificate.captured_energy_loss <= 1e-6


def test_tolerance_zero_means_the_exact_svd():
    W = white_noise(40, 30)
    found = truncated_svd(W, 5, tolerance=0)
    assert found.certificate.algorithm == "exact" and found.certificate.bound == "exact"


@pytest.mark.parametrize("seed", range(5))
def test_default_meets_the_tolerance_for_every_seed(seed):
    for values in spectra(200).values():
        W = with_spectrum(values, 300, 200, seed=7)
        assert energy_loss(W, *truncated_svd(W, 20, seed=seed)[:3]) <= 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_row_one_column_and_one_entry(algorithm):
    for shape in ((1, 17), (17, 1), (1, 1)):
        W = white_noise(*shape)
        assert_good(W, truncated_svd(W, 1, algorithm=algorithm), 1, 1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (33, 33)])
def test_full_rank_is_exact(algorithm, shape):
    W = white_noise(*shape)
    rank = min(shape)
    U, S, Vh, _ = found = truncated_svd(W, rank, algorithm=algorithm)
    assert_good(W, found, rank, 1e-5)
    assert torch.dist(U * S @ Vh, W) <= 1e-5 * W.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("true_rank", [1, 7, 20])
def test_rank_deficient_matrices_get_a_complete_orthonormal_basis(algorithm, true_rank):
    W = white_noise(90, true_rank) @ white_noise(true_rank, 70, seed=1)
    U, S, Vh, _ = found = truncated_svd(W, 20, algorithm=algorithm)
    assert_good(W, found, 20, 1e-5)
    assert float(S[true_rank:].max() if true_rank < 20 else 0) <= 1e-5 * float(S[0])
    assert torch.dist(U * S @ Vh, W) <= 1e-5 * W.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_matrix_has_zero_values_and_orthonormal_factors(algorithm):
    found = truncated_svd(torch.zeros(50, 40), 6, algorithm=algorithm)
    assert_good(torch.zeros(50, 40), found, 6, 0.0)
    assert not found.S.any() and found.certificate.captured_energy_loss == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("copies", [3, 40, 120])
def test_equal_singular_values_are_all_found(algorithm, copies):
    values = torch.full((120,), 0.5)
    values[:copies] = 1.0
    W = with_spectrum(values, 140, 120)
    found = truncated_svd(W, 30, algorithm=algorithm)
    assert_good(W, found, 30, 1e-3)
    if copies >= 30:
        torch.testing.assert_close(found.S, torch.ones(30), atol=1e-3, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("power", [100, -100, 120, -145])
def test_extreme_magnitudes_give_the_same_factors(algorithm, power):
    W = with_spectrum(spectra(60)["1/i"], 80, 60)
    W = W.half().float()
    plain = truncated_svd(W * 2.0 ** -(power < -126), 8, algorithm=algorithm)
    extreme = (W.double() * 2.0**power).float()
    found = truncated_svd(extreme, 8, algorithm=algorithm)
    assert deviation_from_identity(found.U) < 1e-5 and deviation_from_identity(found.Vh.T) < 1e-5
    if power > -126:
        torch.testing.assert_close(found.S.double() / 2.0**power, plain.S.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.U[:, :3], plain.U[:, :3], rtol=0, atol=1e-2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_entries_near_1e30_and_1e_30(algorithm, size):
    W = white_noise(60, 50) * size
    assert_good((W.double() / size).float(), scaled_back(truncated_svd(W, 9, algorithm=algorithm), size), 9, 1e-3)


def scaled_back(found, size):
    return found._replace(S=(found.S.double() / size).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes_are_decomposed_in_fp32(dtype):
    W = with_spectrum(spectra(80)["1/sqrt(i)"], 100, 80).to(dtype)
    for algorithm in ALGORITHMS:
        assert_good(W, truncated_svd(W, 10, algorithm=algorithm), 10, 1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_views_give_the_factors_of_their_values(algorithm):
    store = white_noise(120, 160)
    for view in (store.T, store[::2, 5:85], store[:, ::2], store.T[3:90, ::3], store[:1].expand(30, 160)):
        before = store.clone()
        rank = 6
        found = truncated_svd(view, rank, algorithm=algorithm)
        assert_good(view, found, rank, 1e-3)
        assert torch.equal(store, before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_transposing_swaps_the_factors(algorithm):
    W = with_spectrum(spectra(60)["1/i"], 90, 60)
    there, back = (truncated_svd(x, 5, algorithm=algorithm, tolerance=1e-6) for x in (W, W.T))
    torch.testing.assert_close(there.S, back.S, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.U.abs(), back.Vh.T.abs(), rtol=0, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 60), n=st.integers(1, 60), data=st.data(), seed=st.integers(0, 2**32))
def test_any_shape_and_rank(m, n, data, seed):
    rank = data.draw(st.integers(1, min(m, n)))
    algorithm = data.draw(st.sampled_from(ALGORITHMS))
    W = white_noise(m, n, seed % 1000)
    assert_good(W, truncated_svd(W, rank, algorithm=algorithm, seed=seed), rank, 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_inf_are_refused(bad, dtype):
    W = white_noise(20, 30).to(dtype)
    W[7, 11] = bad
    with pytest.raises(WeightError, match="NaN or Inf"):
        truncated_svd(W, 3)
    with pytest.raises(WeightError, match="NaN or Inf"):
        truncated_svd(torch.stack([white_noise(20, 30).to(dtype), W]), 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 0},
        {"rank": 31},
        {"rank": True},
        {"rank": 2, "tolerance": 1.0},
        {"rank": 2, "tolerance": -1e-3},
        {"rank": 2, "tolerance": float("nan")},
        {"rank": 2, "algorithm": "fast"},
        {"rank": 2, "niter": 4},
        {"rank": 2, "algorithm": "subspace", "niter": -1},
        {"rank": 2, "warm_start": torch.zeros(29, 2)},
        {"rank": 2, "warm_start": torch.full((30, 2), float("nan"))},
        {"rank": 2, "warm_start": torch.ones(30, 2), "algorithm": "exact"},
    ],
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        truncated_svd(white_noise(40, 30), **arguments)


def test_only_float_matrices_and_batches_are_taken():
    for W in (torch.ones(5), torch.ones(2, 3, 4, 5), torch.ones(4, 4, dtype=torch.int64)):
        with pytest.raises(WeightError):
            truncated_svd(W, 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_seed_fixes_the_bits_and_the_global_generator_is_left_alone(algorithm):
    W = white_noise(80, 70)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = truncated_svd(W, 9, algorithm=algorithm, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    second = truncated_svd(W, 9, algorithm=algorithm, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("algorithm", ITERATIVE)
def test_another_seed_is_another_sketch(algorithm):
    W = white_noise(80, 70)
    first, second = (truncated_svd(W, 9, algorithm=algorithm, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.U, second.U)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_largest_entry_of_each_left_vector_is_positive(algorithm):
    U = truncated_svd(white_noise(50, 60), 8, algorithm=algorithm).U
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_matrix_has_the_same_bits_alone_and_in_any_batch(algorithm):
    batch = torch.stack([white_noise(70, 50, seed) for seed in range(3)])
    together = truncated_svd(batch, 7, algorithm=algorithm)
    assert together.U.shape == (3, 70, 7) and together.S.shape == (3, 7) and together.Vh.shape == (3, 7, 50)
    assert len(together.certificate) == 3
    for i, W in enumerate(batch):
        alone = truncated_svd(W, 7, algorithm=algorithm)
        assert torch.equal(alone.U, together.U[i]) and torch.equal(alone.Vh, together.Vh[i])
        assert alone.certificate.captured_energy_loss == together.certificate[i].captured_energy_loss


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sketch", [None, torch.bfloat16], ids=["fp32", "bf16 sketch"])
def test_the_batched_cuda_path_gives_the_same_answer_on_a_cpu(algorithm, sketch):
    batch = torch.stack([with_spectrum(spectra(80)[d], 80, 100) for d in ("1/i", "slow", "spiked", "deficient")])
    found = decompose(batch, 10, 1e-3, algorithm, 0, sketch=sketch)
    for i, W in enumerate(batch):
        assert_good(W, (found.U[i], found.S[i], found.Vh[i], found.certificate[i]), 10, 1e-3)
        exact = torch.linalg.svdvals(W.double())[:10]
        assert float((found.S[i] - exact).abs().max()) <= 2e-2 * float(exact[0])


def test_niter_reproduces_torchs_svd_lowrank():
    W = with_spectrum(spectra(150)["1/sqrt(i)"], 200, 150)
    best = optimal_energy(W, 20)
    for niter in (1, 4):
        ours = truncated_svd(W, 20, algorithm="subspace", niter=niter)
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, q=20, niter=niter)
        assert ours.certificate.passes == 2 + 2 * niter
        loss, theirs = energy_loss(W, ours.U, ours.S, ours.Vh, best), energy_loss(W, U, S, V.T, best)
        assert 0.5 * theirs <= loss <= 2 * theirs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(150, 110), (110, 150), (130, 130)])
def test_a_warm_start_refreshes_a_changed_matrix_in_one_pass_there_and_back(side, shape):
    W = with_spectrum(spectra(110)["1/sqrt(i)"], *shape)
    U, _, Vh, cold = truncated_svd(W, 12, algorithm="krylov")
    changed = W + 1e-2 * W.std() * white_noise(*shape, seed=9)
    subspace = Vh.T if side == "right" else U
    found = truncated_svd(changed, 12, warm_start=subspace)
    assert energy_loss(changed, found.U, found.S, found.Vh) <= 1e-3
    if shape[0] != shape[1] or side == "right":
        assert found.certificate.passes <= 5 < cold.passes


def test_a_stale_or_useless_warm_start_costs_time_not_accuracy():
    W = with_spectrum(spectra(110)["1/sqrt(i)"], 150, 110)
    bottom = torch.linalg.svd(W)[2][-12:].T
    for start in (bottom, torch.zeros(110, 12), torch.ones(110, 3), white_noise(110, 40)):
        before = start.clone()
        assert_good(W, truncated_svd(W, 12, warm_start=start), 12, 1e-3)
        assert torch.equal(start, before)


def test_process_wide_matmul_precision_is_ignored_and_kept():
    W = with_spectrum(spectra(90)["1/i"], 120, 90)
    plain = truncated_svd(W, 8, algorithm="krylov")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = truncated_svd(W, 8, algorithm="krylov")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain.U, found.U)


def test_the_gram_bound_allows_for_the_rounding_of_the_gram_matrix():
    W = with_spectrum(spectra(90)["1/i"], 120, 90)
    in_fp32 = truncated_svd(W, 8, algorithm="gram", tolerance=1e-3).certificate
    in_fp64 = truncated_svd(W, 8, algorithm="gram", tolerance=1e-6).certificate
    assert in_fp32.captured_energy_loss >= FP32_ROUNDING
    assert ROUNDING <= in_fp64.captured_energy_loss < 1e-6


def test_the_configuration_knows_the_algorithms():
    assert PissaConfig(rank=2, algorithm="krylov").algorithm == "krylov"
    with pytest.raises(ConfigError, match="algorithm"):
        PissaConfig(rank=2, algorithm="fast")  # pyright: ignore[reportArgumentType]
