"""PiSSA in five minutes: adapt a model, look at what that costs, train, have the base back, save, load anywhere.

    python examples/five_minutes.py OUT [--model MODEL] [--steps 20]

OUT is a LoRA for the untouched base: exactly what training changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pissa import PissaConfig, adapt, reference, smollm2

TEXTS = [f"Question: What is {i} plus {i}? Answer: {i} plus {i} is {2 * i}." for i in range(2, 18)]


def main() -> None:
    """Every step that a user needs, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    source = options.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**batch).logits

    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = logits(base)
    model = adapt(base, PissaConfig(rank=16))
    print(f"1. adapted: the same function up to {float((logits(model) - before).abs().max()):.1e}")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(options.steps):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    print(f"2. trained: loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    with reference(model):
        print(f"3. the base is still there, up to {float((logits(model) - before).abs().max()):.1e}")

    model.save_pretrained(options.out)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, str(options.out))
    print(f"4. by PEFT alone on the base: off by {float((logits(loaded) - logits(model)).abs().max()):.1e}")


if __name__ == "__main__":
    main()
