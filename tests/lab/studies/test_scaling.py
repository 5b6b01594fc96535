"""The scaling study's shapes and fits, against models whose sizes and costs are known."""

from __future__ import annotations

import pytest
from passes import Quick

from pissa.lab.studies.scaling import (
    MEASURED,
    PREDICTED,
    all_svds,
    fitted,
    memory_law,
    power_law,
    predicted,
    verdict_of,
)


def test_shapes_have_their_models_sizes() -> None:
    billions = {"100M": 0.134, "1B": 1.1, "7B": 6.74, "13B": 13.0, "34B": 33.7, "70B": 69.0}
    for name, size in billions.items():
        assert PREDICTED[name].parameters / 1e9 == pytest.approx(size, rel=0.01)
    for _, shape, size, _, _ in MEASURED:
        assert 2 * shape.parameters == pytest.approx(size, rel=0.001)  # bf16, norms aside


def test_a_power_law_and_a_linear_model_are_found_again() -> None:
    rows = [{"m": m, "n": 64, "seconds": 3e-6 * (64 * m) ** 1.25} for m in (64, 256, 1024)]
    law = power_law(rows)
    assert (law["a"], law["p"]) == pytest.approx((3e-6, 1.25))
    assert law["residuals"] == pytest.approx([0, 0, 0], abs=1e-9)
    inits = [
        {
            "shape": list(shape),
            "bytes": size,
            "threads": threads,
            "seconds": 4 + 1.5 * all_svds(shape, law) / threads + 0.7 * size / 1e9,
        }
        for (_, shape, size, _, _), threads in zip(MEASURED, (1, 2, 1, 2), strict=True)
    ]
    model = fitted(inits, law)
    assert model["coefficients"] == pytest.approx([4, 1.5, 0.7], rel=1e-6)
    assert model["factor"] == pytest.approx(1, abs=1e-6)
    expected = 4 + 1.5 * all_svds(PREDICTED["70B"], law) / 2 + 0.7 * 2 * PREDICTED["70B"].parameters / 1e9
    assert predicted("70B", 16, model, law)["seconds"] == pytest.approx(expected)


def test_memory_follows_the_largest_matrix() -> None:
    sizes = {"100M": 2048 * 768, "13B": 13824 * 5120, "70B": 28672 * 8192}
    rows = [{"shape": list(PREDICTED[name]), "peak_gib": 0.5 + 2e-8 * size} for name, size in sizes.items()]
    law = memory_law([*rows, {"shape": list(PREDICTED["7B"]), "peak_gib": None}])
    assert (law["base"], law["slope"]) == pytest.approx((0.5, 2e-8))
    assert law["residuals"] == pytest.approx([0, 0, 0], abs=1e-9)


def test_models_are_measured_and_predicted(quick: Quick) -> None:
    results = quick("scaling")["results"]
    assert [row["name"] for row in results["inits"]] == ["tiny", *(name for name, *_ in MEASURED)]
    assert len(results["model"]["residuals"]) == 5
    assert {each["name"] for each in results["predictions"]} == set(PREDICTED)
    assert all(each["low"] <= each["seconds"] <= each["high"] for each in results["predictions"])


def test_the_verdict_needs_seconds_and_a_small_share() -> None:
    def verdict(seconds: float, share: float) -> str:
        return verdict_of([{"name": "7B", "rank": 8, "seconds": 1, "high": seconds, "training_share": share}], 8)

    assert verdict(10, 1e-6) == "holds"
    assert verdict(100, 1e-6) == verdict(10, 0.5) == "holds in part"
    assert verdict(100, 0.5) == "does not hold here"
