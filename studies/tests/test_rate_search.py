"""The search for learning rates: its grid grows until it encloses the best one."""

import math

import pytest

from pissa.errors import ConfigError, TrainingError
from studies.lm import LanguageTask, find_rates
from studies.search import SEARCH_SEED, search_rates
from studies.study import Settings


def bowl(best):
    """A loss that is least at one rate, in the logarithm."""

    def measure(method, rate, seed, **about):
        assert seed == SEARCH_SEED
        return {"held_out_loss": (math.log(rate) - math.log(best[method])) ** 2, **about}

    return measure


def test_the_best_rate_of_the_grid_is_chosen(tmp_path):
    rates = dict.fromkeys("ab", (1e-3, 2e-3, 4e-3, 8e-3))
    found = search_rates(Settings(tmp_path), "s", rates, bowl({"a": 2e-3, "b": 4.2e-3}))
    assert found.best == {"a": 2e-3, "b": 4e-3}
    assert found.at_edge == []
    assert list(found.values["a"]) == ["0.001", "0.002", "0.004", "0.008"]
    assert str(found) == "a 0.002, b 0.004"


@pytest.mark.parametrize(("best", "expected"), [(3e-2, 3.2e-2), (1.2e-4, 1.25e-4)])
def test_the_grid_grows_to_where_the_best_rate_is(tmp_path, best, expected):
    found = search_rates(Settings(tmp_path), "s", {"a": (1e-3, 2e-3, 4e-3)}, bowl({"a": best}))
    assert found.best["a"] == pytest.approx(expected)
    assert found.at_edge == []


def test_a_grid_that_never_encloses_the_best_rate_says_so(tmp_path):
    found = search_rates(Settings(tmp_path), "s", {"a": (1e-3, 2e-3)}, bowl({"a": 10.0}))
    assert found.at_edge == ["a"]
    assert found.as_dict()["at_edge"] == ["a"]
    assert "end of its grid: a" in str(found)


def test_a_run_that_diverges_is_worse_than_any_other(tmp_path):
    def measure(method, rate, seed):
        if rate > 2e-3:
            raise TrainingError("loss inf in step 3")
        return {"held_out_loss": 1 / rate}

    found = search_rates(Settings(tmp_path), "s", {"a": (1e-3, 2e-3, 4e-3)}, measure)
    assert found.best["a"] == 2e-3
    assert found.values["a"]["0.004"] is None


def test_what_else_decides_a_result_is_part_of_the_cell(tmp_path):
    loss = bowl({"a": 2e-3})
    calls = []

    def measure(**key):
        calls.append(key)
        return loss(**key)

    for steps in (1, 2, 1):
        search_rates(Settings(tmp_path), "s", {"a": (1e-3, 2e-3, 4e-3)}, measure, steps=steps)
    assert [call["steps"] for call in calls] == [1, 1, 1, 2, 2, 2]


def test_a_quick_pass_measures_nothing(tmp_path):
    found = search_rates(Settings(tmp_path, scale="quick"), "s", {"a": (1e-3, 2e-3, 4e-3)}, dict)
    assert found.best == {"a": 2e-3}


def test_another_value_can_be_minimised(tmp_path):
    def measure(method, rate, seed):
        return {"accuracy": 1 - (rate - 2e-3) ** 2}

    found = search_rates(Settings(tmp_path), "s", {"a": (1e-3, 2e-3, 4e-3)}, measure, lambda row: -row["accuracy"])
    assert found.best["a"] == 2e-3


@pytest.mark.parametrize("rates", [(), (2e-3, 1e-3), (1e-3, 1e-3)])
def test_rates_that_do_not_ascend_are_refused(tmp_path, rates):
    with pytest.raises(ConfigError, match="ascending"):
        search_rates(Settings(tmp_path), "s", {"a": rates}, dict)


def test_rates_of_a_task_are_found_on_its_validation_rows(tmp_path):
    task = LanguageTask("base", "problems", [], [{"row": "validation"}], [{"row": "held-out"}], (1e-3, 2e-3), 5, 2, 4)
    tried = []

    def measure(task, /, method, rate, seed, rank):
        tried.append((method, rate))
        assert (task.held_out, seed, rank) == ([{"row": "validation"}], SEARCH_SEED, 8)
        return bowl({"lora": 1.5e-3, "full": 4e-4})(method, rate, seed)

    found = find_rates(Settings(tmp_path), "s", task, ("lora", "full"), measure, rank=8)
    assert found.best == {"lora": 2e-3, "full": 5e-4}
    assert set(tried) >= {("lora", 1e-3), ("lora", 2e-3), ("full", 2.5e-4), ("full", 5e-4)}


def test_several_runs_at_a_rate_are_averaged(tmp_path):
    def measure(method, rate, seed):
        lucky = rate == 4e-3 and seed == SEARCH_SEED
        return {"held_out_loss": 0.0 if lucky else abs(math.log(rate / 2e-3)) + 0.5}

    rates = {"a": (1e-3, 2e-3, 4e-3, 8e-3)}
    assert search_rates(Settings(tmp_path), "s", rates, measure).best == {"a": 4e-3}
    assert search_rates(Settings(tmp_path), "t", rates, measure, runs=3).best == {"a": 2e-3}
