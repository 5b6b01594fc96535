"""What clients are given: a short run of SmolLM2 with its exports, and tiny variants of everything an adapter can be.

The tiny ones have SmolLM2's tokenizer, which every client knows, and heads of a size that every attention kernel has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pissa import PissaConfig, Quantization, adapt, export_lora, export_merged, init_checkpoint
from pissa.checkpoint.disk.write import write_json
from pissa.lab.models import smollm2
from pissa.training.recipe import Recipe
from pissa.training.run import train

PROMPTS = (
    "The capital of France is the city of Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(",
    "Water boils at one hundred degrees and it freezes at zero degrees when",
)
NEW_TOKENS = 12
ROWS = [
    {
        "instruction": f"Add {n} and {n + 3}.",
        "output": f"The sum of {n} and {n + 3} is {2 * n + 3}, as everybody knows.",
    }
    for n in range(24)
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "alpha": 3.0},
    "patterns": {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 9.0}},
    "patterns-rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9.0}},
    "budget": {"rank_budget": 12000},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head", "q_proj", "up_proj"]},
    "offset": {"placement": "offset"},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": None},  # some of the prompts'
    "in-full": {"modules_to_save": ["norm"]},
}
"""Tiny variant -> its settings."""
REFUSED_BY_SERVERS = ("dora", "tokens", "in-full")
PLAIN_PEFT: dict[str, dict[str, Any]] = {
    "bias": {"bias": "lora_only"},
    "alora": {"alora_invocation_tokens": [5, 6]},
    "replicated": {"layer_replication": [(0, 2), (1, 2)]},
}
"""Adapters of PEFT's own that pissa never makes and vLLM refuses."""


@dataclass(frozen=True)
class Subject:
    """A base, and adapters for it."""

    name: str
    base: Path
    adapters: dict[str, Path]
    """Variant -> a PEFT directory for the base."""
    run: Path
    """What the adapters were exported from: a run, or a saved adapter."""


def smollm2_run(place: Path) -> Subject:
    """SmolLM2 trained for a few steps at rank 8, and its exports."""
    base, run = smollm2(), place / "run"
    recipe = Recipe(
        rank=8, learning_rate=1e-3, batch_size=8, micro_batch_size=4, max_steps=4, dtype="fp32", template="chat"
    )
    train(str(base), ROWS, run, recipe, quiet=True)
    adapters = {"run itself": run, "rank 8": place / "rank-8", "tolerance 0.1": place / "tolerance"}
    if not adapters["rank 8"].exists():
        export_lora(run, adapters["rank 8"], rank=8)
    if not adapters["tolerance 0.1"].exists():
        export_lora(run, adapters["tolerance 0.1"], tolerance=0.1)
    return Subject("SmolLM2-135M-Instruct", base, adapters, run)


def tiny_base(place: Path) -> Path:
    """A Llama with two layers and random weights, untied, in fp32, with SmolLM2's tokenizer."""
    base = place / "base"
    if not base.exists():
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(base)
        tokenizer.save_pretrained(base)
    return base


def tiny_variants(place: Path) -> Subject:
    """A trained adapter of every kind on the tiny base."""
    base, adapters = tiny_base(place), {}
    rows = prompts(base)
    settings_of = {**SETTINGS, "tokens": {"trainable_token_indices": tuple(sorted({*rows[0][1:4]}))}}
    for name, settings in settings_of.items():
        adapters[name] = place / name
        if not adapters[name].exists():
            model = adapt(AutoModelForCausalLM.from_pretrained(base), PissaConfig(4, **settings))
            _train(model, rows)
            export_lora(model, adapters[name])
    for name, settings in PLAIN_PEFT.items():
        adapters[name] = place / name
        if not adapters[name].exists():
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
            model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            model.save_pretrained(str(adapters[name]))
    return Subject("tiny Llama", base, adapters, place / "plain")


def gptq_run(place: Path) -> Subject:
    """A tiny residual in GPTQ's 4 bits with an adapter trained on it."""
    base, run = tiny_base(place), place / "gptq"
    if not run.exists():
        config = PissaConfig(8, quantization=Quantization("gptq", iterations=2))
        model = adapt(AutoModelForCausalLM.from_pretrained(base), config)
        _train(model, prompts(base))
        model.save_pretrained(str(run))
        AutoTokenizer.from_pretrained(base).save_pretrained(run / "residual")
    return Subject("tiny Llama in GPTQ's 4 bits", run / "residual", {"trained on it": run}, run)


def split_checkpoint(base: Path, place: Path) -> Path:
    """`pissa init` of a base."""
    out = place / "split"
    init_checkpoint(base, out, PissaConfig(8))
    return out


def merged(subject: Subject, place: Path) -> Path:
    """The run merged into its base."""
    out = place / "merged"
    if not out.exists():
        export_merged(subject.run, out)
    return out


def _train(model: Any, rows: list[list[int]]) -> None:
    """A few steps on the prompts that visibly move a tiny model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    shortest = min(map(len, rows))
    batch = torch.tensor([row[:shortest] for row in rows])
    for _ in range(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def expected(base: Path, adapter: Path | None) -> dict[str, Any]:
    """What transformers and PEFT make of the prompts: greedy tokens, and the log-probability of each.

    Args:
        base: the base's directory.
        adapter: a PEFT directory; None for the base alone.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return greedy(model.eval(), prompts(base))


def prompts(base: Path) -> list[list[int]]:
    """The prompts as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@torch.no_grad()
def greedy(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Greedy continuations without a stop, token by token, and the log-probability of each."""
    tokens, values = [], []
    for row in rows:
        ids, found = torch.tensor([row]), []
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            found.append(float(logits.max()))
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
        tokens.append(ids[0, len(row) :].tolist())
        values.append(found)
    return {"prompts": rows, "tokens": tokens, "logprobs": values}


@torch.no_grad()
def scored(model: Any, reference: dict[str, Any]) -> dict[str, Any]:
    """What a model thinks of another one's continuations: its own choice at each place, and the given one's
    log-probability."""
    tokens, values = [], []
    for row, chosen in zip(reference["prompts"], reference["tokens"], strict=True):
        logits = model(input_ids=torch.tensor([[*row, *chosen]])).logits[0].double().log_softmax(-1)
        logits = logits[len(row) - 1 : -1]
        tokens.append(logits.argmax(-1).tolist())
        values.append(logits.gather(1, torch.tensor(chosen)[:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": values}


def rounded(tensor: torch.Tensor, form: str) -> torch.Tensor:
    """What is left of values that a GGUF stores as f16, bf16 or q8_0 (blocks of 32 with a scale in f16)."""
    if form == "q8_0":
        blocks = tensor.reshape(*tensor.shape[:-1], -1, 32)
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        return (torch.where(scales > 0, blocks / scales, 0.0).round() * scales).reshape(tensor.shape)
    return tensor.to({"f16": torch.float16, "bf16": torch.bfloat16}[form]).float()


@torch.no_grad()
def stored_as(model_directory: Path, reference: dict[str, Any], form: str) -> dict[str, Any]:
    """What transformers makes of a reference's continuations when weights, and what goes into every linear layer, are
    rounded as llama.cpp's kernels round them: how far storing in few bits may lead away.

    Args:
        model_directory: in fp32.
        reference: of that model.
        form: f16, bf16 or q8_0.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    for weight in {id(p): p for p in model.parameters() if p.ndim == 2}.values():
        weight.copy_(rounded(weight, form))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], form), *inputs[1:]))
    return scored(model, reference)


def save(path: Path, document: Any) -> Path:
    """Write JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return path


def read(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))
