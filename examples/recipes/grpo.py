"""GRPO with TRL on a PiSSA model: rewards decide, and the reference of the KL term is the base itself.

    python examples/recipes/grpo.py OUT [--model MODEL] [--data ROWS.jsonl] [--steps 10] [--tokens 32]

Each row of ROWS.jsonl has prompt and answer; a completion whose last number is the answer is worth 1, one with another
number a tenth. OUT/lora is a LoRA for the untouched base, of rank 16.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from pissa import PissaConfig, adapt, export_lora, smollm2

ROWS = [{"prompt": f"{i} + {i + 1} =", "answer": str(2 * i + 1)} for i in range(2, 34)]


def states_the_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number is the answer, 0.1 where there is another one."""
    found = [re.findall(r"-?\d+", completion) for completion in completions]
    pairs = zip(found, answer, strict=True)
    return [0.0 if not numbers else 1.0 if numbers[-1] == right else 0.1 for numbers, right in pairs]


def main() -> None:
    """Reward right answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    source = options.model or str(smollm2())
    rows = [json.loads(line) for line in options.data.read_text().splitlines()] if options.data else ROWS
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = adapt(AutoModelForCausalLM.from_pretrained(source), PissaConfig(rank=16))
    settings = GRPOConfig(
        output_dir=str(options.out / "state"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=options.tokens,
        learning_rate=1e-5,
        beta=0.04,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=states_the_answer,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    log = trainer.state.log_history
    rewards, divergences = ([float(entry[key]) for entry in log if key in entry] for key in ("reward", "kl"))
    print(f"reward: {rewards[0]:.3f} at the first step, {rewards[-1]:.3f} at the last")
    print(f"divergence from the base: {divergences[0]:g} at the first step, {divergences[-1]:.2g} at the last")
    export_lora(model, options.out / "lora", rank=16)


if __name__ == "__main__":
    main()
