"""Results of a comparison that nobody ran: the contract of results.json, for tests of what is made from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

STEPS, PROBLEMS = 120, 150
BASE_LOSS = 1.45
# method: (learning rate, loss at the end, how fast it falls, first gradient norm, shift of accuracy in logits)
KNOWN = {
    "lora": (2e-3, 0.80, 16.0, 0.5, 0.0),
    "pissa": (2e-4, 0.79, 7.0, 6.0, 0.1),
    "dora": (2e-3, 0.80, 16.0, 0.6, 0.05),
    "qlora": (2e-3, 0.86, 18.0, 0.6, -0.5),
    "qpissa": (2e-4, 0.81, 8.0, 5.0, -0.1),
    "full": (2e-5, 0.70, 10.0, 3.0, 0.9),
}


def make_results(
    *methods: str,
    seeds: int = 5,
    accuracy: bool = True,
    forgetting: bool = True,
    null: bool = True,
    rng_seed: int = 0,
) -> dict[str, Any]:
    """As `pissa compare` writes them; names that are not known behave as LoRA does."""
    names = methods or ("lora", "pissa", "dora")
    rng = np.random.default_rng(rng_seed)
    difficulty = rng.standard_normal(PROBLEMS)
    shared = {"accuracy": accuracy, "forgetting": forgetting, "difficulty": difficulty, "rng": rng}
    base_losses = BASE_LOSS * np.exp(0.2 * difficulty)
    return {
        "command": "pissa compare --model SmolLM2 --data 'my data.jsonl' --methods " + ",".join(names),
        "settings": {
            "model": "/models/SmolLM2-135M-Instruct",
            "data": "gsm8k.jsonl",
            "plan": {"methods": list(names), "recipe": {"rank": 32, "dtype": "fp32"}, "steps": STEPS, "seeds": seeds,
                     "rates": None, "null": null},
        },
        "versions": {"python": "3.11.7", "pissa": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "a processor", "cores": 2, "threads": 1},
        "task": {"name": "gsm8k.jsonl", "train_rows": 7000, "validation_rows": 100, "test_rows": PROBLEMS},
        "base": {
            "test_loss": float(base_losses.mean()),
            "test_losses": base_losses.tolist(),
            "curve_loss": BASE_LOSS,
            "test_correct": [bool(d > 2) for d in difficulty] if accuracy else None,
            "perplexity": 14.2 if forgetting else None,
        },
        "methods": {
            name: {
                "learning_rate": _known(name)[0],
                "on_edge": False,
                "trials": _trials(_known(name), rng),
                "runs": [_run(_known(name), seed, **shared) for seed in range(seeds)],
                "quantization_error": {"mean_quantization_gap": 0.031, "largest_quantization_gap": 0.042}
                if name.startswith("q")
                else None,
            }
            for name in names
        },
        "null": {
            "method": "lora",
            "learning_rate": 2e-3,
            "runs": [_run(KNOWN["lora"], 500 + seed, **shared) for seed in range(seeds)],
        }
        if null
        else None,
    }  # fmt: skip


def _known(name: str) -> tuple[float, float, float, float, float]:
    return KNOWN.get(name, KNOWN["lora"])


def _run(known: Any, seed: int, *, accuracy: bool, forgetting: bool, difficulty: Any, rng: Any) -> dict[str, Any]:
    rate, end, pace, norm, shift = known
    steps = np.arange(STEPS)
    luck = 0.006 * rng.standard_normal()
    falling = end + luck + (BASE_LOSS - end) * np.exp(-steps / pace)
    test = (end + 0.15 + luck) * np.exp(0.2 * difficulty) * (1 + 0.02 * rng.standard_normal(PROBLEMS))
    solved = rng.random(PROBLEMS) < 1 / (1 + np.exp(0.6 - shift - 1.4 * difficulty))
    return {
        "seed": seed,
        "status": "done",
        "learning_rate": rate,
        "losses": (falling + 0.08 * rng.standard_normal(STEPS)).tolist(),
        "grad_norms": (norm * (0.3 + 0.7 * np.exp(-steps / 30)) * np.exp(0.15 * rng.standard_normal(STEPS))).tolist(),
        "validation_loss": float(test.mean()),
        "test_loss": float(test.mean()),
        "test_losses": test.tolist(),
        "test_correct": solved.tolist() if accuracy else None,
        "during": [
            {"step": step, "loss": float(falling[step - 1] + 0.15), "accuracy": None} for step in (30, 60, 90, 120)
        ],
        "perplexity_before": 14.2 if forgetting else None,
        "perplexity_after": 14.2 * math.exp(0.03 + 0.01 * rng.standard_normal()) if forgetting else None,
        "seconds": 312.0 + 9 * rng.standard_normal(),
        "init_seconds": 4.0 + 0.2 * rng.standard_normal(),
        "peak_memory_gib": 5.1,
        "trainable_parameters": 9_768_960,
        "tokens_per_second": 410.0,
    }


def _trials(known: Any, rng: Any) -> list[dict[str, Any]]:
    rate, end, *_ = known
    found = []
    for rung, factors in enumerate(((0.1, 0.316, 1.0, 3.16, 10.0), (0.316, 1.0))):
        for factor in factors:
            loss = end + 0.25 / (rung + 1) + 0.1 * math.log10(factor) ** 2 + 0.004 * rng.standard_normal()
            found.append(
                {
                    "learning_rate": rate * factor,
                    "rung": rung,
                    "steps": 30 * (rung + 1),
                    "seed": 1000,
                    "status": "diverged" if factor == 10 else "done",
                    "validation_loss": None if factor == 10 else loss,
                    "losses": [1.4, 1.2],
                    "grad_norms": [1.0, 1.0],
                    "seconds": 60.0,
                }
            )
    return found
