"""The scaling study's shapes and fits, against models whose sizes and costs are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from passes import Quick

from studies.scaling import parts_of
from studies.scaling_laws import all_svds, fitted, memory_law, power_law, predicted
from studies.scaling_shapes import MEASURED, MEASURED_THREADS, PREDICTED


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


def test_the_parts_are_seconds_and_a_small_share() -> None:
    def shown(high: float, share: float) -> list[bool]:
        prediction = {"name": "7B", "rank": 8, "seconds": 1, "low": 0.5, "high": high, "training_share": share}
        return [part.above_zero for part in parts_of([prediction], 8).values()]

    assert shown(10, 1e-6) == [True, True]
    assert shown(100, 1e-6) == [False, True]
    assert shown(10, 0.5) == [True, False]
    slow = {"name": "7B", "rank": 8, "seconds": 200, "low": 100, "high": 400, "training_share": 1e-6}
    seconds, share = parts_of([slow], 8).values()
    assert (seconds.low, seconds.mean, seconds.high) == pytest.approx((22.7 - 400, 22.7 - 200, 22.7 - 100))
    assert (share.low, share.high) == pytest.approx((0.01 - 2e-6, 0.01 - 0.5e-6))


def test_the_published_measurements_are_the_benchmark_s() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "init.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = {row["bytes"]: (row["init_seconds"], row["peak_bytes"], row["threads"]) for row in rows}
    for _, _, size, seconds, peak in MEASURED:
        assert found[size] == (pytest.approx(seconds, abs=0.005), peak, MEASURED_THREADS)
    assert len(found) == len(MEASURED)
