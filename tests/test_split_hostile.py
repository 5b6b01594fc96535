"""Splits of matrices on which numerical code fails: right, or an error in words. A weight is looked at once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hostile import OtherRounding, hostile_matrices, noise
from pissa.config import METHODS, PissaConfig, Quantization, quantization_preset
from pissa.decompose import scale, svd
from pissa.decompose.leading import leading_triplets
from pissa.decompose.svd import truncated_svd
from pissa.errors import WeightError
from pissa.quantize.alternate import alternate
from pissa.quantize.formats import quantize_matrix
from pissa.quantize.metric import metric
from pissa.split import Weight, split_one, split_weight
from tiny import tiny_llama

MATRICES = hostile_matrices(32, 64)
QUANTIZATIONS = {
    "qlora": quantization_preset("qlora", double_quant=False),
    "loftq": quantization_preset("loftq-1", double_quant=True),
    "qpissa": quantization_preset("qpissa-5", double_quant=False),
    "ours": quantization_preset("ours-5", double_quant=True),
    "int8": Quantization("int8"),
    "gptq": Quantization("gptq", rounding="gptq", block_size=32),
}


def check_split(W: Tensor, config: PissaConfig, **given: Any) -> None:
    try:
        split = split_weight(W, config, name="layer.weight", **given)
    except WeightError as error:
        assert "layer.weight" in str(error) and "\n" not in str(error)
        # values beyond what the storage or fp32 can hold are the only excuse
        assert float(W.abs().max()) > 1e28 or config.method == "cura"
        return
    assert bool(torch.isfinite(split.A).all()) and bool(torch.isfinite(split.B).all())
    whole = split.residual.double() + split.scale * split.B.double() @ split.A.double()
    size = float(W.double().norm())
    left = float((whole - W.double()).norm()) / size if size else 0.0
    # factors of CURA can be far larger than their product, and fp32 rounds in proportion to them
    factors = float(split.scale * split.A.double().norm() * split.B.double().norm()) / size if size else 0.0
    # and denormal numbers keep few of their bits
    least = torch.finfo(W.dtype).smallest_normal * torch.finfo(W.dtype).eps
    denormal = least * W.numel() ** 0.5 / size if size else 0.0
    noise_level = 1e-6 * max(1.0, factors) + denormal
    if config.quantization is None:
        assert left <= noise_level + (2.0**-8 if W.dtype == torch.bfloat16 else 0.0)
    if size > 1e-36:
        assert left == pytest.approx(split.certificate.rounding, rel=1e-3, abs=noise_level)


@pytest.mark.parametrize("kind", ["own", "up"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_splits_every_matrix(method: Any, kind: str) -> None:
    chosen: dict[str, Any] = {"random_fraction": 0.5} if method == "random-pissa" else {}
    with nullcontext() if kind == "own" else OtherRounding(kind):
        for W in MATRICES.values():
            for dtype in (torch.float32, torch.bfloat16) if kind == "own" else (torch.float32,):
                check_split(W.to(dtype), PissaConfig(4, method=method, **chosen))


@pytest.mark.parametrize(
    ("format_", "kind"), [*((each, "own") for each in QUANTIZATIONS), ("loftq", "up"), ("qpissa", "random")]
)
def test_every_format_takes_every_matrix(format_: str, kind: str) -> None:
    method: Any = "lora-kaiming" if format_ == "qlora" else "pissa"
    config = PissaConfig(4, method=method, quantization=QUANTIZATIONS[format_])
    few = noise(20, 64, seed=3)
    with nullcontext() if kind == "own" else OtherRounding(kind):
        for W in MATRICES.values():
            if format_ != "gptq":
                check_split(W, config)
            if format_ != "qlora":
                check_split(W.to(torch.bfloat16), config, moment=few.mT @ few)


@pytest.mark.parametrize("name", MATRICES)
def test_every_second_moment_is_taken_or_refused_in_words(name: str) -> None:
    moment = MATRICES[name].mT @ MATRICES[name]
    usable = bool(torch.isfinite(moment).all()) and float(moment.diagonal().sum()) > 0
    for format_ in ("ours", "gptq"):
        config = PissaConfig(4, quantization=QUANTIZATIONS[format_])
        if usable:
            check_split(noise(32, 64), config, moment=moment)
        else:
            with pytest.raises(WeightError, match="second moment for layer"):
                split_weight(noise(32, 64), config, moment=moment, name="layer")


def test_a_weight_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, ...]] = []

    def counted(W: Tensor) -> float:
        looked.append(tuple(W.shape))
        return scale.magnitude(W)

    for name in ("pissa.split", "pissa.decompose.svd", "pissa.decompose.robust", "pissa.quantize.alternate"):
        monkeypatch.setattr(f"{name}.magnitude", counted)
    own = scale.scaled
    monkeypatch.setattr(svd, "scaled", lambda W, largest=None: own(W, counted(W) if largest is None else largest))
    for method in METHODS:
        split_weight(noise(40, 24), PissaConfig(4, method=method))
        assert looked == [(40, 24)], method
        looked.clear()
    split_one(Weight(noise(40, 24), PissaConfig(4), "w", largest=4.0))
    assert looked == []


def test_of_an_svd_at_hand_the_first_triplets_are_taken_and_nothing_is_decomposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = noise(80, 60) * torch.logspace(0, -2, 60)
    found = truncated_svd(W, 16)
    monkeypatch.setattr("pissa.decompose.svd.run", None)
    split = split_one(Weight(W, PissaConfig(8), "w", svd=found))
    best = found.U[:, :8] * found.S[:8] @ found.Vh[:8]
    torch.testing.assert_close(split.B @ split.A, best, rtol=1e-4, atol=1e-5)
    exact = torch.linalg.svdvals(W.double())[:8].square().sum()
    true = 1 - float((2 * (best.double() * W).sum() - best.double().square().sum()) / exact)
    assert true <= split.certificate.captured_energy_loss <= 1e-3


def test_where_the_certificate_of_many_does_not_hold_for_few_they_are_refreshed() -> None:
    W = noise(80, 60)
    found = truncated_svd(W, 50, tolerance=9e-2, algorithm="krylov")
    loose = found._replace(certificate=replace(found.certificate, captured_energy_loss=9e-2))
    first = leading_triplets(loose, W, 2, 1e-3, 0)
    assert first.certificate.captured_energy_loss <= 1e-3
    exact = torch.linalg.svdvals(W.double())[:2]
    torch.testing.assert_close(first.S.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_alternation_that_starts_from_a_known_subspace_ends_where_exact_svds_do(weighted: bool) -> None:
    W, X = noise(96, 128) * torch.logspace(0, -1, 128), noise(40, 128, seed=1)
    config = quantization_preset("loftq-1", double_quant=False)
    given = metric(X.mT @ X, 128) if weighted else None
    E = W - quantize_matrix(W, config, W.dtype).dequantize()
    start = truncated_svd(E if given is None else given.apply(E), 16).Vh.mT
    exact = alternate(W, 8, config, dtype=torch.float32, metric=given, algorithm="exact")
    found = alternate(W, 8, config, dtype=torch.float32, metric=given, start=start)
    assert found.errors[-1] == pytest.approx(exact.errors[-1], rel=1e-4)


def test_under_a_budget_nothing_is_decomposed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from pissa import ranks
    from pissa.decompose import methods, svd
    from pissa.live.budget import with_planned_ranks
    from pissa.live.splits import splits_of
    from pissa.live.targets import resolve_targets

    count = 0
    own = svd.decompose

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return own(*args, **kwargs)

    for module in (ranks, methods):
        monkeypatch.setattr(module, "decompose", counted)
    config = PissaConfig(16, rank_budget=20_000)
    targets = with_planned_ranks(resolve_targets(tiny_llama(hidden=64), config), config, None)
    splits = list(splits_of(targets, config, None))
    assert count == len(targets) == len(splits)
    for target, (split,) in splits:
        W = target.place.matrices()
        weight = Weight(W, config.for_module(target.rank, target.alpha), target.weight_key, svd=target.svds[0])  # pyright: ignore
        again = split_one(weight)
        assert torch.equal(split.A, again.A) and torch.equal(split.B, again.B)
        assert torch.equal(split.residual, again.residual)
        assert split.certificate.captured_energy_loss <= config.tolerance
