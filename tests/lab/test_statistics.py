"""The tests keep their promise: false calls stay below 5 %, and true differences are found as often as they say."""

from __future__ import annotations

import itertools
import math
import random
import re
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pissa.errors import DataError, MissingExtraError
from pissa.evaluation.intervals import wilson
from pissa.lab.comparison.null_arm import null_rate
from pissa.lab.comparison.statistics import (
    Estimate,
    difference,
    difference_moments,
    holm,
    mcnemar,
    mean,
    mean_over_seeds,
    share_interval,
    t_quantile,
)
from pissa.lab.comparison.verdict import (
    CAUTION,
    ERROR,
    METRICS,
    cautious,
    compare_methods,
    decide,
    in_words,
    pairs_of,
    summary,
)

# (seeds of left and right, problems, outcomes, seed noise, method × problem noise)
SHAPES = [
    ((3, 3), 50, "right or wrong", 0.0, 0.0),
    ((3, 3), 50, "right or wrong", 2.0, 0.5),
    ((3, 3), 50, "loss", 0.5, 0.0),
    ((3, 3), 500, "rarely right", 0.5, 0.0),
    ((3, 3), 200, "loss", 0.1, 0.5),
    ((5, 5), 50, "right or wrong", 0.5, 0.0),
    ((5, 5), 50, "heavy tails", 2.0, 0.0),
    ((5, 5), 200, "right or wrong", 0.1, 0.5),
    ((5, 5), 200, "rarely right", 0.0, 0.0),
    ((3, 5), 50, "right or wrong", 2.0, 0.0),
]


def simulate(
    rng: np.random.Generator, sets: int, seeds: int, difficulty: Any, kind: str, seed_noise: float, interaction: float
) -> np.ndarray:
    """Outcomes (sets, seeds, problems) of one method; `difficulty` (sets, 1, problems) is common to all methods."""
    problems = difficulty.shape[-1]
    shift = seed_noise * rng.standard_normal((sets, seeds, 1))
    own = interaction * rng.standard_normal((sets, 1, problems))
    if kind == "loss":
        noise = 1 + 0.1 * (shift + rng.standard_normal((sets, seeds, problems), dtype=np.float32))
        return np.exp(0.5 * difficulty + own) * noise
    if kind == "heavy tails":
        noise = rng.standard_normal((sets, seeds, problems), dtype=np.float32)
        return difficulty + own + shift + 0.3 * noise * np.abs(noise)
    logit = (-4 if kind == "rarely right" else 0) + 1.5 * difficulty + own + shift
    return (rng.random((sets, seeds, problems), dtype=np.float32) < 1 / (1 + np.exp(-logit))).astype(np.float64)


def null_sets(rng: np.random.Generator, sets: int, shape: Any) -> tuple[np.ndarray, np.ndarray]:
    seeds, problems, *noise = shape
    difficulty = rng.standard_normal((sets, 1, problems))
    left, right = (simulate(rng, sets, count, difficulty, *noise) for count in seeds)
    return left, right


def p_values(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = zip(*difference_moments(left, right), strict=True)
    estimates = [Estimate(value, math.sqrt(v), freedom, left.shape[-1]) for value, v, freedom in found]
    return np.array([cautious(estimate.p_value) for estimate in estimates])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_methods_that_are_the_same_are_called_different_in_at_most_5_percent(shape: Any) -> None:
    left, right = null_sets(np.random.default_rng(1), 2000, shape)
    assert (p_values(left, right) <= ERROR).mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    list(
        itertools.product(
            [(3, 3), (5, 5), (3, 5)],
            [50, 500],
            ["right or wrong", "rarely right", "loss", "heavy tails"],
            [0.0, 0.5, 2.0],
            [0.0, 0.5],
        )
    ),
    ids=str,
)
def test_false_calls_stay_below_5_percent_in_every_shape(shape: Any) -> None:
    rng = np.random.default_rng(2)
    called = [p_values(*null_sets(rng, 2000, shape)) <= ERROR for _ in range(3)]
    assert np.mean(called) <= 0.05


@pytest.mark.parametrize("seeds", [(3, 3), (5, 5), (3, 5), (5, 3)], ids=str)
def test_equal_methods_whose_seeds_differ_unequally_are_not_called_different(seeds: tuple[int, int]) -> None:
    rng, sets = np.random.default_rng(12), 2000
    difficulty = rng.standard_normal((sets, 1, 60))
    calm, wild = (
        simulate(rng, sets, count, difficulty, "heavy tails", noise, 0.0)
        for count, noise in zip(seeds, (0.05, 0.5), strict=True)
    )
    assert (p_values(calm, wild) <= ERROR).mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", [((3, 3), 100, 0.5, 0.0), ((3, 3), 100, 2.0, 0.5), ((5, 5), 300, 0.1, 0.0)], ids=str)
def test_a_family_of_comparisons_makes_a_false_call_in_at_most_5_percent(shape: Any) -> None:
    """Five methods that are the same, in accuracy and in loss: ten comparisons at once, corrected by Holm."""
    rng, sets = np.random.default_rng(3), 2000
    (seeds, _), problems, *noise = shape
    difficulty = rng.standard_normal((sets, 1, problems))
    p = []
    for kind in ("right or wrong", "loss"):
        reference, *others = (simulate(rng, sets, seeds, difficulty, kind, *noise) for _ in range(6))
        p += [p_values(other, reference) for other in others]
    assert np.mean([min(holm(row)) <= ERROR for row in np.stack(p, 1).tolist()]) <= 0.05


@pytest.mark.parametrize("kind", ["right or wrong", "loss"])
def test_a_difference_of_the_smallest_detectable_size_is_found_in_four_of_five(kind: str) -> None:
    rng, sets = np.random.default_rng(4), 300
    difficulty = rng.standard_normal((sets, 1, 200))
    left, right = (simulate(rng, sets, 5, difficulty, kind, 0.3, 0.0) for _ in range(2))
    value, variance, freedom = difference_moments(left, right)
    estimates = [Estimate(*row, 200) for row in zip(value, np.sqrt(variance), freedom, strict=True)]
    effect = np.mean([estimate.smallest_detectable(ERROR / CAUTION) for estimate in estimates])
    shifted = [Estimate(e.value + effect, e.standard_error, e.freedom, 200).p_value for e in estimates]
    found = np.mean([cautious(p) <= ERROR for p in shifted])
    assert 0.7 < found < 0.97


def test_a_bootstrap_over_problems_alone_would_not_do() -> None:
    """What the two sources of noise are for: lucky seeds make two equal methods differ on every problem."""
    left, right = null_sets(np.random.default_rng(5), 500, ((3, 3), 200, "right or wrong", 1.0, 0.0))
    by_problem = left.mean(1) - right.mean(1)
    naive: Any = stats.ttest_1samp(by_problem, 0, axis=1)
    assert (naive.pvalue <= ERROR).mean() > 0.3
    assert (p_values(left, right) <= ERROR).mean() <= 0.05


def test_seed_noise_alone_gives_welchs_test() -> None:
    rng = np.random.default_rng(6)
    seeds = rng.standard_normal((2, 5))
    left, right = (np.repeat(row[:, None], 10_000, 1) for row in seeds)
    found = difference(left, right)
    expected: Any = stats.ttest_ind(seeds[0], seeds[1], equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()), rel=1e-6)


def test_problem_noise_alone_gives_the_paired_t_test() -> None:
    rng = np.random.default_rng(7)
    problems = rng.standard_normal((2, 60))
    left, right = (np.repeat(row[None], 4, 0) for row in problems)
    found = difference(left, right)
    expected: Any = stats.ttest_rel(problems[0], problems[1])
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)


def test_variance_of_a_difference_is_the_simulated_one() -> None:
    rng, sets = np.random.default_rng(8), 4000
    left, right = null_sets(rng, sets, ((4, 4), 30, "heavy tails", 0.3, 0.4))
    value, variance, _ = difference_moments(left, right)
    assert variance.mean() == pytest.approx(value.var(), rel=0.08)


def test_single_seeds_leave_the_noise_of_problems() -> None:
    rng = np.random.default_rng(9)
    left, right = rng.standard_normal((2, 1, 40))
    expected: Any = stats.ttest_rel(left[0], right[0])
    assert difference(left, right).p_value == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        [1.0, 2.0],
        [[1.0]],
        [],
        [[1.0, 2.0], [3.0]],
        [["a", "b"]],
        [[1.0, math.nan]],
        [[1.0, math.inf]],
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="outcomes"):
        difference(wrong, [[1.0, 2.0]])


def test_methods_tested_on_different_problems_are_refused() -> None:
    with pytest.raises(DataError, match="on 3 and on 2 problems"):
        difference([[1, 2, 3]], [[1, 2]])


def test_outcomes_that_never_vary_show_nothing() -> None:
    same = difference(np.ones((3, 10)), np.ones((3, 10)))
    assert (same.value, same.standard_error, same.p_value) == (0.0, 0.0, 1.0)
    assert difference(np.ones((3, 3)), np.zeros((3, 3))).p_value == 0.25
    assert share_interval(np.zeros((3, 20))) == pytest.approx(wilson(0, 20), abs=1e-3)


@pytest.mark.parametrize("t", [1e-9, 0.1, 1.0, 4.3, 60.0])
def test_p_values_are_students_in_closed_form(t: float) -> None:
    tails = {
        1: 1 - 2 / math.pi * math.atan(t),
        2: 1 - t / math.sqrt(2 + t * t),
        3: 1 - 2 / math.pi * (math.atan(t / math.sqrt(3)) + t / math.sqrt(3) / (1 + t * t / 3)),
        math.inf: math.erfc(t / math.sqrt(2)),
    }
    for freedom, tail in tails.items():
        for sign in (-1, 1):
            assert Estimate(sign * t, 1.0, freedom, 2000).p_value == pytest.approx(tail, rel=1e-9, abs=1e-15)


def test_quantiles_are_those_of_the_tables() -> None:
    table = {(0.05, 1): 12.706205, (0.05, 9): 2.262157, (0.01, 3): 5.840909, (0.05, math.inf): 1.959964}
    for (error, freedom), expected in table.items():
        assert t_quantile(error, freedom) == pytest.approx(expected, abs=1e-6)
    assert t_quantile(1.0, 3.7) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("freedom", [1.3, 3.7, 50.0, 2e5])
def test_a_difference_as_large_as_its_quantile_has_that_p_value(freedom: float) -> None:
    for error in (0.9, 0.05, 1e-5):
        assert Estimate(t_quantile(error, freedom), 1.0, freedom, 2000).p_value == pytest.approx(error, rel=1e-9)


def test_mcnemar_is_the_sign_test_of_the_problems_that_differ() -> None:
    rng = random.Random(0)
    for shares in ((0.4, 0.6), (0.5, 0.5), (0.0, 1.0)):
        for _ in range(20):
            left, right = ([rng.random() < share for _ in range(40)] for share in shares)
            wins = sum(a > b for a, b in zip(left, right, strict=True))
            differing = sum(a != b for a, b in zip(left, right, strict=True))
            fewer = min(wins, differing - wins)
            both_tails = 2 * sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
            assert mcnemar(left, right) == pytest.approx(min(1.0, both_tails), rel=1e-9)
    assert mcnemar([True, False], [True, False]) == 1
    with pytest.raises(DataError, match="2 and 1 answers"):
        mcnemar([True, False], [True])


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'pissa[report]'")):
        t_quantile(0.05, 3)


def test_holm_is_the_stepwise_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_interval_of_an_accuracy_grows_with_seed_noise_and_stays_between_0_and_1() -> None:
    rng = np.random.default_rng(10)
    alike = rng.random((5, 100)) < 0.1
    noisy = rng.random((5, 100)) < np.array([0.01, 0.02, 0.1, 0.15, 0.22])[:, None]
    (low, high), (wide_low, wide_high) = share_interval(alike), share_interval(noisy)
    assert 0 <= wide_low < low < alike.mean() < high < wide_high < 1
    assert mean(noisy).value == pytest.approx(noisy.mean())


def test_mean_over_seeds_is_the_t_interval() -> None:
    values = [1.0, 2.0, 4.0]
    found = mean_over_seeds(values)
    assert found.interval() == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))
    assert mean_over_seeds([3.0]).interval() == (-math.inf, math.inf)
    with pytest.raises(DataError, match="no value"):
        mean_over_seeds([])


def results(**shifts: float) -> dict[str, Any]:
    """Results of methods whose accuracy and loss are shifted against LoRA's, five seeds on 150 problems."""
    rng = np.random.default_rng(11)
    difficulty = rng.standard_normal((1, 1, 150))

    def runs(shift: float, count: int = 5) -> list[dict[str, Any]]:
        correct = simulate(rng, 1, count, difficulty + shift, "right or wrong", 0.1, 0.0)[0]
        losses = simulate(rng, 1, count, difficulty, "loss", 0.1, 0.0)[0] * (1 - 0.1 * shift)
        return [
            {"status": "done", "test_correct": (right > 0).tolist(), "test_losses": loss.tolist()}
            for right, loss in zip(correct, losses, strict=True)
        ]

    methods = {name.replace("_", "+"): {"runs": runs(shift)} for name, shift in {"lora": 0.0, **shifts}.items()}
    return {"methods": methods, "null": {"method": "lora", "runs": runs(0.0)}}


def test_a_better_method_is_called_better_and_an_equal_one_is_not() -> None:
    found = {(c.left, c.metric.name): c for c in compare_methods(results(pissa=2.0, dora=0.0))}
    assert found["pissa", "accuracy"].better == "pissa"
    assert found["pissa", "test loss"].better == "pissa"
    assert found["dora", "accuracy"].better is None
    assert "pissa is better" in in_words(found["pissa", "accuracy"])
    assert "No detectable difference; a true one of" in in_words(found["dora", "accuracy"])
    words = "pissa is better than lora in accuracy and test loss. No detectable difference from lora: dora."
    assert summary(list(found.values())) == words


def test_a_worse_method_loses_to_lora() -> None:
    found = {c.metric.name: c for c in compare_methods(results(pissa=-2.0))}
    assert [found[name].better for name in ("accuracy", "test loss")] == ["lora", "lora"]
    assert "lora is better" in in_words(found["accuracy"])
    assert summary(list(found.values())) == "lora is better than pissa in accuracy and test loss."


def test_an_interval_leaves_zero_out_exactly_where_a_call_is_made() -> None:
    shifts = {f"m{index}": 0.1 * index for index in range(8)}
    for comparison in compare_methods(results(**shifts)):
        low, high = comparison.interval
        assert (low > 0 or high < 0) == comparison.called


def test_more_comparisons_ask_for_more() -> None:
    few = {c.metric.name: c for c in compare_methods(results(pissa=1.0))}
    many = {c.metric.name: c for c in compare_methods(results(pissa=1.0, **{f"m{i}": 0.0 for i in range(10)}))[:11:11]}
    assert many["accuracy"].adjusted_p > few["accuracy"].adjusted_p


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_seeds_make_no_call(count: int) -> None:
    given = results(pissa=4.0)
    given["methods"]["pissa"]["runs"] = given["methods"]["pissa"]["runs"][:count]
    found = compare_methods(given)
    assert not any(c.called for c in found)
    assert all("3 of each are needed" in in_words(c) for c in found)
    assert "No verdict yet" in summary(found)


def test_single_runs_are_compared_by_mcnemar() -> None:
    given = results(pissa=1.0)
    for method in given["methods"].values():
        method["runs"] = method["runs"][:1]
    left, right = (given["methods"][name]["runs"][0]["test_correct"] for name in ("pissa", "lora"))
    assert compare_methods(given)[0].p_value == mcnemar(left, right)


def test_runs_that_diverged_or_have_not_finished_are_left_out() -> None:
    given = results(pissa=1.0)
    given["methods"]["pissa"]["runs"] += [{"status": "diverged", "test_losses": [math.nan]}, {"status": "running"}]
    assert compare_methods(given)[0].seeds == (5, 5)
    given["methods"]["dora"] = {"runs": []}
    assert {c.left for c in compare_methods(given)} == {"pissa"}


def test_methods_are_compared_with_lora_and_quantised_ones_with_qlora_too() -> None:
    assert pairs_of(["pissa", "lora", "qlora", "qpissa"]) == [
        ("pissa", "lora"),
        ("qlora", "lora"),
        ("qpissa", "lora"),
        ("qpissa", "qlora"),
    ]
    assert pairs_of(["qlora", "qpissa"]) == [("qpissa", "qlora")]
    assert pairs_of(["pissa", "dora"]) == [("dora", "pissa")]
    assert pairs_of([]) == []
    with pytest.raises(DataError, match="no results of rora"):
        compare_methods(results(), [("rora", "lora")])


def test_decide_takes_nothing() -> None:
    assert decide([]) == []
    assert compare_methods({"methods": {}}) == []


def test_lora_against_itself_is_called_different_in_at_most_5_percent() -> None:
    found = null_rate(results(), resamples=400)
    assert found is not None
    assert found.seeds == (5, 5)
    assert found.groupings == 126
    assert found.share <= 0.05
    assert len(found.differences["accuracy"]) == 400
    spread = found.spread("accuracy")
    assert sum(abs(d) <= spread for d in found.differences["accuracy"]) == pytest.approx(380, abs=2)
    assert found == null_rate(results(), resamples=400)


def test_a_null_arm_that_differs_from_its_method_does_not_count_against_the_tool() -> None:
    """Regrouping mixes both arms, so that a shift between them is noise of the seeds."""
    shifted = results()
    for run in shifted["null"]["runs"]:
        run["test_losses"] = [1.5 * loss for loss in run["test_losses"]]
    found = null_rate(shifted, resamples=300)
    assert found is not None
    assert found.share <= 0.05


def test_null_rate_needs_a_null_arm_of_three_seeds() -> None:
    given = results()
    assert null_rate({**given, "null": None}) is None
    given["null"]["runs"] = given["null"]["runs"][:2]
    assert null_rate(given) is None


def test_every_metric_has_a_direction() -> None:
    assert {metric.name: metric.higher_is_better for metric in METRICS} == {"accuracy": True, "test loss": False}
