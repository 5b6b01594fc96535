"""One matrix into residual and adapter: exact, deterministic, and nothing of the caller's is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa.config import COMPONENTS, METHODS, Method, PissaConfig
from pissa.errors import ConfigError, WeightError
from pissa.split import STORAGE_DTYPES, Weight, split_each, split_weight
from tiny import global_generators

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of 1, the largest relative error of rounding once."""


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random matrix whose singular values fall off, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=generator) * torch.logspace(0, -1, shape[1])
    return W.to(dtype)


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * B.double() @ A.double()


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int], PissaConfig, torch.dtype]:
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    rank, method = draw(st.integers(1, min(shape))), draw(st.sampled_from(METHODS))
    chosen: dict[str, Any] = {}
    if method == "pissa":
        chosen["component"] = draw(st.sampled_from(COMPONENTS))
    elif method == "random-pissa":
        chosen["random_fraction"] = draw(st.floats(0, min(1, (min(shape) - rank) / rank)))
    elif method == "cura":
        # the intersection's residual can be so large that nothing is left of W in 16 bits
        chosen["cur_rcond"] = draw(st.sampled_from([None, 0.0, 0.1]))
    config = PissaConfig(
        rank=rank,
        alpha=draw(st.sampled_from([None, 0.5, 3, 64.0])),
        method=method,
        **chosen,
        use_rslora=draw(st.booleans()),
        seed=draw(st.integers(0, 2**40)),
    )
    return shape, config, draw(st.sampled_from(STORAGE_DTYPES))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_split_reconstructs_weight(case: tuple[tuple[int, int], PissaConfig, torch.dtype]) -> None:
    shape, config, dtype = case
    W = weight(*shape, dtype=dtype)
    before = W.clone()
    gradient = weight(*shape, seed=1) if config.needs_gradient else None
    split = split_weight(W, config, gradient=gradient)

    assert split.A.shape == (config.rank, shape[1]) and split.B.shape == (shape[0], config.rank)
    assert split.A.dtype == split.B.dtype == torch.float32
    assert split.A.is_contiguous() and split.B.is_contiguous() and split.residual.is_contiguous()
    assert split.residual.shape == shape and split.residual.dtype == dtype
    assert split.restore().dtype == dtype
    assert torch.equal(W, before)

    whole = split.residual.double() + product(split.A, split.B, split.scale)
    error = float((whole - W.double()).norm() / W.double().norm())
    # factors of CURA can be far larger than their product, and fp32 rounds in proportion to them
    size = float(split.scale * split.A.norm() * split.B.norm() / W.float().norm())
    noise = 16 * UNIT[torch.float32] * max(1.0, size)
    assert error <= UNIT[dtype] + noise
    assert abs(error - split.certificate.rounding) <= noise
    if config.starts_at_zero:
        assert error == 0


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_takes_the_principal_components_and_shares_them_evenly(shape: tuple[int, int], use_rslora: bool) -> None:
    W, rank = weight(*shape), 5
    split = split_weight(W, PissaConfig(rank, alpha=3.0, use_rslora=use_rslora, algorithm="exact"))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert split.scale == pytest.approx(3.0 / (rank**0.5 if use_rslora else rank))
    assert float((product(split.A, split.B, split.scale) - best).norm() / best.norm()) < 1e-5
    assert float((split.residual.double() - (W.double() - best)).norm() / best.norm()) < 1e-5
    shared = S[:rank] / split.scale
    torch.testing.assert_close(split.A.double().square().sum(1), shared, rtol=1e-5, atol=0)
    torch.testing.assert_close(split.B.double().square().sum(0), shared, rtol=1e-5, atol=0)
    assert split.certificate.captured_energy_loss <= 1e-6


@pytest.mark.parametrize("method", ["lora-kaiming", "lora-gaussian"])
def test_lora_leaves_the_weight_bit_for_bit_and_never_shares_its_memory(method: Method) -> None:
    W = weight(6, 8, dtype=torch.bfloat16)
    split = split_weight(W, PissaConfig(2, method=method))
    assert torch.equal(split.residual, W) and split.residual.data_ptr() != W.data_ptr()
    assert not split.B.any() and split.A.any()


@pytest.mark.parametrize("method", METHODS)
def test_split_is_deterministic_and_leaves_global_generators_alone(method: Method) -> None:
    W, config = weight(40, 30), PissaConfig(4, method=method, seed=3)
    before = global_generators()
    first = split_weight(W, config, name="a.weight")
    assert global_generators() == before
    torch.manual_seed(2)
    second = split_weight(W.clone(), config, name="a.weight")
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in ("A", "B", "residual"))


def test_random_draws_differ_from_weight_to_weight_and_from_seed_to_seed() -> None:
    W = weight(8, 8)
    draws = [
        split_weight(W, PissaConfig(2, method="lora-kaiming", seed=seed), name=name).A
        for seed, name in [(0, "a"), (0, "b"), (1, "a"), (0, None)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("method", METHODS)
def test_views_and_parameters_are_split_like_their_values(method: Method) -> None:
    stored = torch.nn.Parameter(weight(12, 20))
    plain = split_weight(stored.detach().T.contiguous(), PissaConfig(3, method=method))
    view = split_weight(stored.T, PissaConfig(3, method=method))
    assert not view.A.requires_grad and not view.residual.requires_grad
    noise = 16 * UNIT[torch.float32] * float(stored.detach().abs().max())
    torch.testing.assert_close(view.residual, plain.residual, rtol=0, atol=noise)
    torch.testing.assert_close(view.B @ view.A, plain.B @ plain.A, rtol=0, atol=noise)


def test_a_zero_weight_splits_into_zeros() -> None:
    split = split_weight(torch.zeros(4, 6), PissaConfig(2))
    assert not split.A.any() and not split.B.any() and not split.residual.any()
    assert split.certificate.rounding == 0 and split.certificate.captured_energy_loss == 0


@pytest.mark.parametrize(
    ("W", "said"),
    [
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "NaN or Inf"),
        (torch.tensor([[1.0, float("-inf")], [0.0, 1.0]]), "NaN or Inf"),
        (torch.ones(4, 4, dtype=torch.float64), "float64"),
        (torch.ones(4, 4, dtype=torch.int8), "int8"),
        (torch.ones(4), r"\(4,\)"),
        (torch.ones(2, 4, 4), r"\(2, 4, 4\)"),
    ],
)
def test_what_is_no_finite_matrix_is_refused_by_name(W: Tensor, said: str) -> None:
    with pytest.raises(WeightError, match=rf"layers\.3\.weight.*{said}"):
        split_weight(W, PissaConfig(1), name="layers.3.weight")


def test_a_residual_that_overflows_its_dtype_is_refused() -> None:
    W = 65000 * torch.sign(weight(8, 8)).half()
    with pytest.raises(WeightError, match=r"model\.q\.weight is too large.*torch\.float16"):
        split_weight(W, PissaConfig(1), name="model.q.weight")
    assert torch.isfinite(split_weight(W.float(), PissaConfig(1)).residual).all()


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (0, 5)])
def test_a_rank_above_the_smaller_side_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"rank 4 exceeds {min(shape)}"):
        split_weight(torch.ones(shape), PissaConfig(4))


def test_many_weights_have_the_same_bits_on_any_number_of_threads() -> None:
    weights = [Weight(weight(24 + i, 40, seed=i), PissaConfig(rank=4), f"layer{i}") for i in range(7)]
    one_by_one = [split_weight(W, config, name=name) for W, config, name, *_ in weights]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        side_by_side = list(split_each(weights))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for left, right in zip(one_by_one, side_by_side, strict=True):
        assert torch.equal(left.A, right.A) and torch.equal(left.B, right.B)
        assert torch.equal(left.residual, right.residual)


def test_many_weights_name_the_one_that_cannot_be_split() -> None:
    bad = torch.full((8, 8), float("nan"))
    weights = [Weight(weight(8, 8), PissaConfig(rank=2), "good"), Weight(bad, PissaConfig(rank=2), "bad")]
    with pytest.raises(WeightError, match="bad holds NaN"):
        list(split_each(weights))
