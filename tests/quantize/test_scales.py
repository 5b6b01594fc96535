"""The scale search against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pissa.quantize.nf4 import NF4_VALUES, nf4_table
from pissa.quantize.scales import Table, search_scales

CPU = torch.device("cpu")


def error_of(blocks: Tensor, scales: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n,) fp64: squared error with the best codes, by trying all sixteen."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    distance = (blocks.double()[..., None] - scales.double()[:, None, None] * values).abs().amin(-1).square()
    return (distance if weights is None else distance * weights.double()).sum(1)


def exhaustive(block: Tensor) -> float:
    """The least squared error of a tiny block over all codes, each with its least-squares scale."""
    best = float(block.double().square().sum())
    for t in itertools.product(NF4_VALUES, repeat=len(block)):
        values = torch.tensor(t, dtype=torch.float64)
        energy = float(values @ values)
        if energy > 0:
            best = min(best, float(block.double().square().sum()) - float(block.double() @ values) ** 2 / energy)
    return max(best, 0.0)


def test_lookup_finds_the_nearest_code_exactly_even_beside_a_boundary() -> None:
    table = nf4_table(CPU)
    edges = table.boundaries
    v = torch.cat(
        [
            edges,
            torch.nextafter(edges, torch.tensor(2.0)),
            torch.nextafter(edges, torch.tensor(-2.0)),
            torch.linspace(-1.5, 1.5, 100_001),
            table.values,
        ]
    )
    assert torch.equal(table.codes(v).int(), torch.bucketize(v, edges, out_int32=True))


def test_near_lookup_errs_only_beside_boundaries() -> None:
    table = nf4_table(CPU)
    v = torch.linspace(-1.2, 1.2, 50_001)
    exact = table.values[table.codes(v).long()]
    wrong = table.nearest(v) != exact
    distance = (v[wrong, None] - table.boundaries).abs().amin(1)
    assert float(wrong.float().mean()) < 0.01 and float(distance.max()) < 3e-4


def test_search_comes_close_to_all_codes_of_small_blocks() -> None:
    blocks = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    best = torch.tensor([exhaustive(block) for block in blocks], dtype=torch.float64)
    found = error_of(blocks, search_scales(blocks, nf4_table(CPU), signed=True))
    assert bool((found >= best - 1e-9).all())
    # Three values are the hardest case: their error has many narrow minima. Against their own energy it is small.
    assert float((found - best).sum()) < 0.01 * float(blocks.square().sum())


@pytest.mark.parametrize("signed", [False, True])
def test_search_comes_close_to_a_fine_grid_of_scales(signed: bool) -> None:
    blocks = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    absmax = blocks.abs().amax(1)
    signs = (1, -1) if signed else (1,)
    grid = torch.stack([error_of(blocks, s * m * absmax) for s in signs for m in torch.linspace(0.5, 1.3, 161)]).amin(0)
    found = error_of(blocks, search_scales(blocks, nf4_table(CPU), signed=signed))
    plain = error_of(blocks, absmax)
    assert float(found.sum()) < 1.02 * float(grid.sum())
    assert bool((found <= plain * (1 + 1e-4) + 1e-9).all())


def test_weights_move_the_scale_to_what_matters() -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(128, 64, generator=generator)
    weights = torch.rand(128, 64, generator=generator).pow(4) + 1e-3
    with_weights = search_scales(blocks, nf4_table(CPU), signed=True, weights=weights)
    without = search_scales(blocks, nf4_table(CPU), signed=True)
    assert error_of(blocks, with_weights, weights).sum() < 0.95 * error_of(blocks, without, weights).sum()
    same = search_scales(blocks, nf4_table(CPU), signed=True, weights=torch.full_like(weights, 2.0))
    torch.testing.assert_close(same, without)


def test_scales_follow_their_block_in_size_and_sign() -> None:
    blocks = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    scales = search_scales(blocks, nf4_table(CPU), signed=True)
    assert torch.equal(search_scales(8 * blocks, nf4_table(CPU), signed=True), 8 * scales)
    assert bool((search_scales(blocks, nf4_table(CPU), signed=False) > 0).all())
    assert torch.equal(search_scales(torch.zeros(2, 64), nf4_table(CPU), signed=True), torch.zeros(2))


def test_a_table_whose_boundaries_share_a_cell_is_refused() -> None:
    with pytest.raises(AssertionError):
        Table(torch.tensor([0.0, 1e-5, 2e-5]))
