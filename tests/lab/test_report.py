"""The demo's report says what the numbers say, also where LoRA wins."""

from __future__ import annotations

import copy
from typing import Any

from pissa.lab.demo.report import demo_report, demo_summary, final_loss


def results(**after: float) -> dict[str, Any]:
    """Results of a demo whose training losses end at the values given for pissa, lora and lora_tuned."""
    ends = {"pissa": 0.5, "lora": 0.9, "lora_tuned": 0.6, **after}
    rates = {"pissa": 2e-4, "lora": 2e-4, "lora_tuned": 2e-3}
    runs = [
        {
            "name": name.replace("_", "-"),
            "label": f"{name} lr {rates[name]:g}",
            "method": name.partition("_")[0],
            "learning_rate": rates[name],
            "rank": 8,
            "seed": 0,
            "losses": [2.0] * 10 + [end] * 10,
            "grad_norms": [6.0 if name == "pissa" else 0.5] * 20,
            "tokens_per_second": 100.0,
            "init_seconds": 1.0,
            "exact_match_before": 0.0,
            "exact_match_after": 0.25,
            "exact_match_after_by_template": {"seen": 0.5, "unseen": 0.0},
            "held_out_loss_before": 2.0,
            "held_out_loss_after": end,
        }
        for name, end in ends.items()
    ]
    export = {"max_abs_logit_difference": 1e-5, "max_abs_logit": 20.0, "rank": 16, "directory": "run"}
    costs = {"seconds": 300.0, "peak_memory_gib": 4.0}
    learned = ["1 + 1?", "3 (wrong)", "2 (right)"]
    task = {"name": "sums", "held_out": 16, "new_tokens": 64, "base_cut": 12}
    return {"runs": runs, "learned": learned, "export": export, "task": task, **costs}


def test_report_says_that_pissa_leads_where_it_does() -> None:
    report = demo_report(results())
    assert "PiSSA's training loss ends lower: 0.500 (PiSSA) against 0.900 (LoRA)" in report
    assert "12.0 times LoRA's" in report
    assert "stays behind PiSSA in training loss (0.600 against 0.500)" in report


def test_report_says_that_lora_wins_where_it_does() -> None:
    report = demo_report(results(lora=0.3, lora_tuned=0.2))
    assert "LoRA's training loss ends lower: 0.300 (LoRA) against 0.500 (PiSSA)" in report
    assert "ends ahead of PiSSA in training loss (0.200 against 0.500)" in report
    assert "lowest first: lora_tuned lr 0.002 0.200, lora lr 0.0002 0.300, pissa lr 0.0002 0.500" in report


def test_report_calls_losses_that_hardly_differ_level() -> None:
    assert "the training losses end level: 0.500 (PiSSA) against 0.510" in demo_report(results(lora=0.51))
    assert "ends level with PiSSA in training loss (0.510 against 0.500)" in demo_report(results(lora_tuned=0.51))


def test_report_names_no_winner_of_a_tie() -> None:
    assert "several tie" in demo_report(results())
    won = copy.deepcopy(results())
    won["runs"][1]["exact_match_after"] = 0.5
    assert "lora lr 0.0002 solves most" in demo_report(won)


def test_it_is_said_how_many_answers_of_the_base_were_cut() -> None:
    said = "answers end at 64 tokens, which 12 of the base's do not fit"
    assert f"the base solves 0% ({said})" in demo_report(results())
    assert f"16 held-out problems; {said}" in demo_summary(results())


def test_report_holds_for_data_of_unknown_kinds() -> None:
    unknown = results()
    for run in unknown["runs"]:
        run["exact_match_after_by_template"] = None
    assert "never seen" not in demo_report(unknown)


def test_final_loss_is_the_mean_of_the_last_ten_steps() -> None:
    assert final_loss({"losses": [9.0] * 30 + [1.0] * 5 + [3.0] * 5}) == 2.0
    assert final_loss({"losses": [9.0, 9.0, 1.0, 3.0]}) == 2.0
    assert final_loss({"losses": [4.0]}) == 4.0
