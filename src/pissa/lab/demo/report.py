"""What was seen, in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.intervals import wilson

LAST = 10
LEVEL = 0.05
"""Losses closer than this share of the larger one are called level."""


def demo_report(results: Mapping[str, Any]) -> str:
    """The demo's report.md: what the numbers say, also where LoRA wins.

    Args:
        results: what the demo's results.json holds.
    """
    runs = {run["name"]: run for run in results["runs"]}
    pissa, lora, tuned = runs["pissa"], runs["lora"], runs["lora-tuned"]
    count = results["task"]["held_out"]
    lines = [
        "# PiSSA and LoRA side by side",
        "",
        f"{results['task']['name'].capitalize()}: {len(pissa['losses'])} steps, rank {pissa['rank']}, one seed "
        f"({pissa['seed']}). Same base, same batches, same order.",
        "",
        "![loss and gradient norm by step](curves.png)",
        "",
        *_table(results["runs"]),
        "",
        f"All of it took {results['seconds']:.0f} s and at most {results['peak_memory_gib']:.1f} GiB of memory.",
        "",
        "## What was seen",
        "",
        f"- {_same_rate(pissa, lora)}",
        f"- {_tuned(pissa, tuned)}",
        f"- {_held_out(pissa, lora, tuned)}",
        f"- {_exact(pissa, lora, tuned, count, _cut(results['task']))}",
        f"- {_export(results['export'])}",
        "",
        *_learned(results["learned"], pissa),
        "One seed and one small task show how the methods differ, not which is better in general: compare on your own "
        "data, each method at its own learning rate and over several seeds, before you choose.",
        "",
    ]
    return "\n".join(lines)


def demo_summary(results: Mapping[str, Any]) -> str:
    """What a terminal shows at the end: the figures, the two sentences that matter, and a problem that was learned.

    Args:
        results: what the demo's results.json holds.
    """
    runs = {run["name"]: run for run in results["runs"]}
    pissa, lora, tuned = runs["pissa"], runs["lora"], runs["lora-tuned"]
    width = max(len(run["label"]) for run in results["runs"])
    rows = [
        f"{'':{width}}  training loss  held-out loss  solved",
        f"{'base':{width}}  {'':13}  {pissa['held_out_loss_before']:13.3f}  {pissa['exact_match_before']:6.0%}",
    ]
    rows += [
        f"{run['label']:{width}}  {final_loss(run):13.3f}  {run['held_out_loss_after']:13.3f}  "
        f"{run['exact_match_after']:6.0%}"
        for run in results["runs"]
    ]
    said = [_same_rate(pissa, lora), _tuned(pissa, tuned), _export(results["export"])]
    counted = f"{results['task']['held_out']} held-out problems; {_cut(results['task'])}"
    return "\n".join([*rows, counted, "", *said, "", *_learned(results["learned"], pissa)])


def _learned(learned: Sequence[str], pissa: Mapping[str, Any]) -> list[str]:
    """A problem that the base gets wrong and the trained model right."""
    if not learned:
        return []
    asked, before, after = learned
    return [f"One held-out problem: {asked}", "", f"- base: {before}", f"- {pissa['label']}: {after}", ""]


def _cut(task: Mapping[str, Any]) -> str:
    """How long an answer may be, and how many of the base's are longer."""
    return f"answers end at {task['new_tokens']} tokens, which {task['base_cut']} of the base's do not fit"


def final_loss(run: Mapping[str, Any]) -> float:
    """Mean training loss of the last ten steps (fewer where a run is shorter than twenty: the last half)."""
    losses = run["losses"]
    return statistics.fmean(losses[-min(LAST, max(len(losses) // 2, 1)) :])


def _table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    head = (
        "| run | first gradient norm | first loss | final training loss | held-out loss before → after "
        "| exact match before → after | tokens/s | init |"
    )
    rows = [
        f"| {run['label']} | {run['grad_norms'][0]:.2f} | {run['losses'][0]:.3f} | {final_loss(run):.3f} "
        f"| {run['held_out_loss_before']:.3f} → {run['held_out_loss_after']:.3f} "
        f"| {run['exact_match_before']:.0%} → {run['exact_match_after']:.0%} "
        f"| {run['tokens_per_second']:.0f} | {run['init_seconds']:.1f} s |"
        for run in runs
    ]
    return [head, "|---|---|---|---|---|---|---|---|", *rows]


def _same_rate(pissa: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    ratio = pissa["grad_norms"][0] / max(lora["grad_norms"][0], 1e-12)
    ends = {"PiSSA": final_loss(pissa), "LoRA": final_loss(lora)}
    lower, higher = sorted(ends, key=lambda name: ends[name])
    if ends[higher] - ends[lower] <= LEVEL * ends[higher]:
        verdict = "the training losses end level"
    else:
        verdict = f"{lower}'s training loss ends lower"
    return (
        f"At the same learning rate ({pissa['learning_rate']:g}) {verdict}: "
        f"{ends[lower]:.3f} ({lower}) against {ends[higher]:.3f} ({higher}). PiSSA's first gradient norm is "
        f"{ratio:.1f} times LoRA's: its "
        "factors start large, along the principal directions, where LoRA's B starts at zero."
    )


def _tuned(pissa: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    ours, theirs = final_loss(pissa), final_loss(tuned)
    if abs(ours - theirs) <= LEVEL * max(ours, theirs):
        verdict, why = "ends level with PiSSA", True
    elif theirs < ours:
        verdict, why = "ends ahead of PiSSA", True
    else:
        verdict, why = "stays behind PiSSA", False
    explained = "; the gain at the same rate is then a matter of the learning rate" if why else ""
    return (
        f"LoRA at ten times that rate ({tuned['learning_rate']:g}; often near its best, not tuned here) {verdict} in "
        f"training loss ({theirs:.3f} against {ours:.3f}){explained}."
    )


def _held_out(*runs: Mapping[str, Any]) -> str:
    ordered = sorted(runs, key=lambda run: run["held_out_loss_after"])
    listed = ", ".join(f"{run['label']} {run['held_out_loss_after']:.3f}" for run in ordered)
    return f"Held-out loss (before: {runs[0]['held_out_loss_before']:.3f}), lowest first: {listed}."


def _exact(pissa: Mapping[str, Any], lora: Mapping[str, Any], tuned: Mapping[str, Any], count: int, cut: str) -> str:
    parts = []
    for run in (pissa, lora, tuned):
        low, high = wilson(run["exact_match_after"] * count, count)
        split = run["exact_match_after_by_template"]
        detail = f"; kinds of problem seen in training {split['seen']:.0%}" if split and "seen" in split else ""
        detail += f", never seen {split['unseen']:.0%}" if split and "unseen" in split else ""
        parts.append(f"{run['label']} {run['exact_match_after']:.0%} (95 % interval {low:.0%} to {high:.0%}{detail})")
    best = max((pissa, lora, tuned), key=lambda run: run["exact_match_after"])
    same = [run for run in (pissa, lora, tuned) if run["exact_match_after"] == best["exact_match_after"]]
    winner = f"{best['label']} solves most" if len(same) == 1 else "several tie"
    return (
        f"Of {count} held-out problems the base solves {pissa['exact_match_before']:.0%} ({cut}); after training "
        f"{', '.join(parts)}: {winner}, and intervals that overlap decide nothing."
    )


def _export(export: Mapping[str, Any]) -> str:
    return (
        f"PiSSA's result is an ordinary LoRA of rank {export['rank']}: loaded by plain PEFT on the untouched base in a "
        f"fresh process, its logits differ from the trained model's by at most "
        f"{export['max_abs_logit_difference']:.1e} (largest logit {export['max_abs_logit']:.0f})."
    )
