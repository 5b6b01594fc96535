"""Time against captured-energy loss, a panel for each class of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(row["class"] for row in rows))
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    names = list(dict.fromkeys(row["rival"] for row in rows))
    for axis, label in zip(axes.flat, labels, strict=False):
        for row in (row for row in rows if row["class"] == label):
            marker = "*" if row["rival"].startswith("pissa") else "o"
            color = plt.get_cmap("tab20")(2 * names.index(row["rival"]) % 19)
            loss = max(row["mean_loss"], 1e-8)
            axis.loglog(loss, row["median_seconds"], marker, color=color, ms=11 if marker == "*" else 6)
        axis.set_title(f"{label}, r {row_rank(rows, label)}", fontsize=8)
        axis.set_xlabel("captured-energy loss")
        axis.set_ylabel("seconds")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(labels) :]:
        axis.axis("off")
    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker="*" if name.startswith("pissa") else "o",
            color=plt.get_cmap("tab20")(2 * i % 19),
            label=name,
        )
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)


def row_rank(rows: list[dict[str, Any]], label: str) -> int:
    return next(row["rank"] for row in rows if row["class"] == label)
