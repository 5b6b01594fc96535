"""Runs where one release of PEFT is installed: an export loaded in every way that it has; a JSON job in, JSON out.

    python peft_loading.py JOB.json OUT.json

A job is {"base": directory, "adapters": {name: directory}, "reference": {name: {"prompts", "tokens", "logprobs"}}}.
What comes out is {way: {name: {"tokens", "logprobs"}}}: the model's own choice at each place of the reference's greedy
continuation, and the log-probability of the reference's token.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def base(job: dict[str, Any]) -> Any:
    """The base in fp32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).eval()


def called(name: str) -> str:
    """What PEFT calls an adapter: torch takes no dots in names of modules."""
    return name.replace(".", "_")


@torch.no_grad()
def scored(model: Any, reference: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The model's choices and the log-probabilities of the reference's tokens."""
    tokens, values = [], []
    for row, chosen in zip(reference["prompts"], reference["tokens"], strict=True):
        logits = model(input_ids=torch.tensor([[*row, *chosen]]), **options).logits[0].double().log_softmax(-1)
        logits = logits[len(row) - 1 : -1]
        tokens.append(logits.argmax(-1).tolist())
        values.append(logits.gather(1, torch.tensor(chosen)[:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": values}


@torch.no_grad()
def mixed(model: Any, job: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Every adapter and the base in one batch (rows of one length: the first prompt of each)."""
    rows = [[*job["reference"][name]["prompts"][0], *job["reference"][name]["tokens"][0]] for name in names]
    start = len(job["reference"][names[0]]["prompts"][0]) - 1
    logits = (
        model(input_ids=torch.tensor(rows), adapter_names=[called(name) for name in names])
        .logits.double()
        .log_softmax(-1)[:, start:-1]
    )
    found = {}
    for name, each in zip(names, logits, strict=True):
        chosen = torch.tensor(job["reference"][name]["tokens"][0])[:, None]
        found[name] = {"tokens": [each.argmax(-1).tolist()], "logprobs": [each.gather(1, chosen)[:, 0].tolist()]}
    return found


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    adapters, reference = job["adapters"], job["reference"]
    result: dict[str, Any] = {"base": {"__base__": scored(base(job), reference["__base__"])}}
    for name, place in adapters.items():
        model = PeftModel.from_pretrained(base(job), place).eval()
        result.setdefault("from_pretrained", {})[name] = scored(model, reference[name])
        with model.disable_adapter():
            result.setdefault("disable_adapter", {})[name] = scored(model, reference["__base__"])
        merged = model.merge_and_unload()
        result.setdefault("merge_and_unload", {})[name] = scored(merged, reference[name])
        with tempfile.TemporaryDirectory() as parent:
            os.symlink(place, os.path.join(parent, "inner"))
            model = PeftModel.from_pretrained(base(job), parent, subfolder="inner").eval()
            result.setdefault("subfolder", {})[name] = scored(model, reference[name])
        native = base(job)
        native.load_adapter(place)
        result.setdefault("transformers load_adapter", {})[name] = scored(native.eval(), reference[name])
    names = [name for name in adapters if name in job["swappable"]]
    if names:
        swapping = PeftModel.from_pretrained(base(job), adapters[names[0]], adapter_name=called(names[0]))
        for name in names[1:]:
            swapping.load_adapter(adapters[name], adapter_name=called(name))
        swapping.eval()
        for name in [*names, *reversed(names)]:
            swapping.set_adapter(called(name))
            result.setdefault("set_adapter", {})[name] = scored(swapping, reference[name])
        result["mixed batch"] = mixed(swapping, job, [*names, "__base__"])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
