"""QPiSSA: a base in 4 bits whose quantisation error is a fraction of QLoRA's, trained on a few rows.

    python examples/qpissa.py ROWS.jsonl OUT [--model MODEL] [--steps 20] [--rank 32]

ROWS.jsonl holds {"question": …, "answer": …} rows. OUT is the run, OUT/residual its 4-bit base, OUT/merged one model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pissa import Recipe, export_merged, smollm2, train


def main() -> None:
    """Train on a quantised residual, then write the trained function as one 16-bit model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    recipe = Recipe(
        quantize="nf4",
        iterations=5,
        rank=options.rank,
        learning_rate=2e-4,
        batch_size=4,
        micro_batch_size=4,
        max_steps=options.steps,
    )
    results = train(options.model or str(smollm2()), options.data, options.out, recipe).results
    print(f"4 bits are off by {100 * results['mean_quantization_gap']:.2f} % of the weights; loss {results['losses']}")
    export_merged(options.out, options.out / "merged")


if __name__ == "__main__":
    main()
