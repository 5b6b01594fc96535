"""The fits of the spectra study, against distributions that are known."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from studies.spectra import student_t


def test_removing_the_principal_part_narrows_every_layer(quick: Quick) -> None:
    results = quick("spectra")["results"]
    assert len(results["layers"]) == 14
    for row in results["layers"]:
        assert row["residual"]["sigma"] < row["W"]["sigma"]
        assert row["residual"]["largest_singular_value"] < row["W"]["largest_singular_value"]
    example = results["example"]
    assert example["curves"]["W"] == sorted(example["curves"]["W"], reverse=True)
    assert sum(example["histograms"]["W"]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("freedom", [3.0, 8.0])
def test_a_student_t_is_found_again(freedom: float) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40_000, generator=generator, dtype=torch.float64)
    chi = torch.randn(40_000, int(freedom), generator=generator, dtype=torch.float64).square().sum(1)
    found, scale = student_t(0.02 * normal / (chi / freedom).sqrt())
    assert found == pytest.approx(freedom, rel=0.15)
    assert scale == pytest.approx(0.02, rel=0.05)
