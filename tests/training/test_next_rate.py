"""The rules by which a learning rate is searched, on loss curves whose minimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa.training.rate_search import (
    FACTOR,
    best_rates,
    good_rate,
    is_on_edge,
    next_on_grid,
    next_rate,
    rate_beyond,
    vertex,
)
from pissa.training.recipe import TRAINING_METHODS


def searched(loss: Callable[[float], float], middle: float, runs: int) -> dict[float, float]:
    """What a search of so many runs tries on a loss curve."""
    tried: dict[float, float] = {}
    for _ in range(runs):
        rate = next_rate(tried, middle)
        assert rate not in tried
        tried[rate] = loss(rate)
    return tried


def bowl(best: float) -> Callable[[float], float]:
    """A parabola in the logarithm of the rate."""
    return lambda rate: math.log(rate / best) ** 2


def test_a_search_begins_around_the_good_region() -> None:
    assert list(searched(bowl(1.0), 2e-3, 3)) == [2e-3, 6.32e-4, 6.32e-3]


def test_beyond_an_end_lies_the_next_rate_and_nothing_where_the_best_is_enclosed() -> None:
    assert rate_beyond({1e-3: 2.0, 2e-3: 1.0}) == 4e-3
    assert rate_beyond({1e-3: 1.0, 2e-3: 2.0}) == 5e-4
    assert rate_beyond({1e-3: 1.0, 2e-3: 2.0}, 10.0) == 1e-4
    assert rate_beyond({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) is None
    assert (rate_beyond({1e-3: 1.0}), rate_beyond({1e-3: 1.0}, 10.0)) == (None, 1e-4)
    # where every run diverged, lower rates are what is left to try
    assert rate_beyond({1e-3: math.inf, 2e-3: math.inf}) == 5e-4


@pytest.mark.parametrize(("best", "towards"), [(1e-9, -1), (1e9, 1)])
def test_it_widens_by_the_same_factor_while_the_best_lies_on_an_edge(best: float, towards: int) -> None:
    rates = list(searched(bowl(best), 1e-3, 7))[3:]
    assert rates == pytest.approx([1e-3 * FACTOR ** (towards * k) for k in (2, 3, 4, 5)], rel=0.01)


def test_inside_it_halves_the_wider_gap_beside_the_best() -> None:
    tried = {1e-4: 3.0, 1e-3: 1.0, 2e-3: 2.0}
    assert next_rate(tried, 1e-3) == pytest.approx(math.sqrt(1e-4 * 1e-3), rel=0.01)
    # of two gaps as wide as each other, the one towards the better neighbour
    for below, above, expected in ((2.0, 3.0, 5.62e-4), (3.0, 2.0, 1.78e-3)):
        assert next_rate({3.16e-4: below, 1e-3: 1.0, 3.16e-3: above}, 1e-3) == pytest.approx(expected, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(shift=st.floats(-2.5, 2.5), middle=st.sampled_from([2e-5, 2e-4, 2e-3]))
def test_ten_runs_find_the_best_rate_of_a_bowl_within_a_factor_of_one_and_a_half(shift: float, middle: float) -> None:
    best = middle * 10**shift
    tried = searched(bowl(best), middle, 10)
    (found,) = best_rates(tried, 1)
    assert not is_on_edge(found, tried)
    assert abs(math.log(found / best)) < math.log(1.5)


def test_runs_that_diverged_bound_the_search_from_above() -> None:
    tried = searched(lambda rate: math.inf if rate > 1e-3 else -math.log(rate / 1e-9), 1e-2, 9)
    (found,) = best_rates(tried, 1)
    assert found <= 1e-3 and found == max(rate for rate, loss in tried.items() if math.isfinite(loss))
    assert best_rates({1e-3: math.inf}, 3) == []


def test_where_everything_diverges_it_goes_on_downwards() -> None:
    rates = list(searched(lambda _: math.inf, 1e-3, 6))
    assert rates[3:] == sorted(rates[3:], reverse=True) and max(rates[3:]) < min(rates[:3])


def test_the_lower_one_of_equally_good_rates_is_better() -> None:
    assert best_rates({3e-3: 1.0, 1e-3: 1.0, 2e-3: 0.5}, 2) == [2e-3, 1e-3]


def test_every_method_has_a_good_region() -> None:
    rates = {method: good_rate(method) for method in TRAINING_METHODS}
    assert rates["full"] < rates["pissa"] < rates["lora"]
    assert rates["pissa+dora"] == rates["qpissa"] == rates["pissa"]
    assert rates["qlora"] == rates["dora"] == rates["lora"]


@pytest.mark.parametrize("best", [3e-6, 2e-3, 0.0123, 0.9])
def test_downhill_from_anywhere_it_encloses_the_best_and_looks_half_as_far_beside_it(best: float) -> None:
    tried: dict[float, float] = {}
    while (rate := next_on_grid(tried, 1e-3)) is not None:
        assert rate not in tried
        tried[rate] = bowl(best)(rate)
    rates = sorted(tried)
    place = rates.index(min(tried, key=tried.__getitem__))
    assert 0 < place < len(rates) - 1 and vertex(tried) == pytest.approx(best, rel=1e-6)
    assert rates[place + 1] / rates[place - 1] < 1.01 * FACTOR


def test_beyond_its_bounds_nothing_is_tried() -> None:
    tried = {1e-3: 1.0, 3.16e-4: 0.5}
    assert next_on_grid(tried, 1e-3, least=2e-4) == pytest.approx(3.16e-4 / FACTOR**0.5, rel=0.01)
    assert next_on_grid(tried, 1e-3) == pytest.approx(1e-4, rel=0.01)
