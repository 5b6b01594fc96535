"""The figure of the study of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figures import band, look_of, new_figure
from .image_task import ADAPTED_TO, DIGITS, METHODS


def draw(results: Mapping[str, Any]) -> Any:
    """Accuracy by rank and at each method's own rate, the first steps on digits, and the convolutional network."""
    figure, panels = new_figure(2, 3)
    one, best = results["at_one_rate"], results["at_best_rate"]
    for method in METHODS:
        entries = {int(rank): table[method] for rank, table in one["pacs_by_rank"].items()}
        means = [entry["mean"] for entry in entries.values()]
        spread = [
            [entry["mean"] - min(entry["values"]) for entry in entries.values()],
            [max(entry["values"]) - entry["mean"] for entry in entries.values()],
        ]
        panels[0].errorbar(list(entries), means, spread, label=method, capsize=3, **look_of(method).line)
    panels[0].set(title=f"{ADAPTED_TO}es, all at {results['rate']:g}", xlabel="rank", ylabel="accuracy")
    panels[0].set_xticks(list(map(int, one["pacs_by_rank"])))
    panels[0].legend(frameon=False, fontsize=8)
    _bars(panels[1], best["pacs"], f"{ADAPTED_TO}es, rank {results['rank']}, each at its own rate", "accuracy")
    if one["cnn"]:
        _bars(panels[2], one["cnn"], f"convolutional network, {ADAPTED_TO}es", "accuracy")
    else:
        panels[2].set_visible(False)
    for panel, name in ((panels[3], "accuracy_by_step"), (panels[4], "losses")):
        _first_steps(panel, results, name)
    _bars(panels[5], one["first_grad_norm"], "digits, first gradient", "norm")
    return figure


def _first_steps(panel: Any, results: Mapping[str, Any], name: str) -> None:
    """A curve for each method on digits, all at one rate; runs that failed are left out."""
    every = results["every"] if name == "accuracy_by_step" else 1
    for method in METHODS:
        where = (DIGITS, method, results["rate"])
        rows = [row for row in results["runs"] if (row["task"], row["method"], row["rate"]) == where]
        curves = [row[name] for row in rows if row["failed"] is None]
        if curves:
            steps = [every * (place + 1) for place in range(len(curves[0]))]
            band(panel, steps, curves, label=method, look=look_of(method))
    label = "accuracy" if name == "accuracy_by_step" else "training loss"
    panel.set(title=f"digits, all at {results['rate']:g}", xlabel="step", ylabel=label)
    panel.legend(frameon=False, fontsize=8)


def _bars(panel: Any, table: Mapping[str, Any], title: str, label: str) -> None:
    """A mean for each method, its seeds as dots."""
    panel.bar(list(table), [entry["mean"] for entry in table.values()], color=[look_of(name).colour for name in table])
    for place, entry in enumerate(table.values()):
        panel.plot([place] * len(entry["values"]), entry["values"], "k.", markersize=5)
    panel.set(title=title, ylabel=label)
    panel.tick_params(axis="x", labelrotation=20)
