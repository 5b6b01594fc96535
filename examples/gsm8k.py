"""PiSSA and LoRA on GSM8K at the same learning rate: loss and gradient norm by step, as JSON and a figure.

    python examples/gsm8k.py PATH/gsm8k/train.jsonl.gz OUT [--model MODEL] [--steps 30] [--rank 32]

OUT/pissa and OUT/lora are the runs; OUT/gsm8k.json and OUT/gsm8k.png show them side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from pissa import Recipe, smollm2, train

NAMES = {"pissa": "PiSSA", "lora": "LoRA"}


def main() -> None:
    """Two runs that differ in the method alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    model = options.model or str(smollm2())
    runs = [one_run(method, model, options) for method in NAMES]
    pissa, lora = runs
    figures = {
        "mean_loss_of_last_ten_steps": {run["method"]: statistics.fmean(run["losses"][-10:]) for run in runs},
        "first_gradient_norm_ratio": pissa["grad_norms"][0] / lora["grad_norms"][0],
    }
    draw(runs, options.out / "gsm8k.png", f"GSM8K, rank {options.rank}, learning rate 2e-4, one seed")
    document = {**figures, "runs": [{key: run[key] for key in run if key != "settings"} for run in runs]}
    (options.out / "gsm8k.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def draw(runs: list[dict], path: Path, title: str) -> None:
    """Loss and gradient norm by step, one line a run."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    for panel, key in zip(figure.subplots(1, 2), ("losses", "grad_norms"), strict=True):
        for run in runs:
            panel.plot(range(1, len(run[key]) + 1), run[key], label=run["label"])
        panel.set(xlabel="step", ylabel=key.replace("_", " "), yscale="log")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.savefig(path)


def one_run(method: str, model: str, options: argparse.Namespace) -> dict:
    """One run's results, with a label for the figure."""
    recipe = Recipe(
        method=method,  # pyright: ignore[reportArgumentType]
        rank=options.rank,
        learning_rate=2e-4,
        batch_size=4,
        micro_batch_size=4,
        max_steps=options.steps,
        dtype="fp32",
        seed=0,
    )
    results = train(model, options.data, options.out / method, recipe).results
    return {**results, "base": Path(results["base"]).name, "label": NAMES[method]}


if __name__ == "__main__":
    main()
