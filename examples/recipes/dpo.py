"""DPO with TRL on a PiSSA model: the reference is the base itself, so the first margin is exactly 0.

    python examples/recipes/dpo.py OUT [--model MODEL] [--data PAIRS.jsonl] [--steps 10] [--placement offset]

Each row of PAIRS.jsonl has prompt, chosen and rejected. OUT/lora is a LoRA for the untouched base, of rank 16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from pissa import PissaConfig, adapt, export_lora, smollm2

PAIRS = [
    {"prompt": f"What is {i} plus {i}?", "chosen": f" The answer is {2 * i}.", "rejected": f" I like the number {i}."}
    for i in range(2, 34)
]


def main() -> None:
    """Prefer answers to remarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--placement", default="residual", choices=["residual", "offset"])
    options = parser.parse_args()
    source = options.model or str(smollm2())
    pairs = [json.loads(line) for line in options.data.read_text().splitlines()] if options.data else PAIRS
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = adapt(AutoModelForCausalLM.from_pretrained(source), PissaConfig(rank=16, placement=options.placement))
    settings = DPOConfig(
        output_dir=str(options.out / "state"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    margins = [float(entry["rewards/margins"]) for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"margin: {margins[0]:g} at the first step, {margins[-1]:.4f} at the last")
    export_lora(model, options.out / "lora", rank=16)


if __name__ == "__main__":
    main()
